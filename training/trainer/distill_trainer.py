"""The trainer of `distill`: the stages' own, with a loss that also asks a teacher.

The teacher is a model that runs beside the student, or its distributions on disk, which come with each block. The
losses that balance experts and predict more tokens live in the student's layers, and train as in every stage.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from deepseek_records.hashes import hash_array
from deepseek_training.compress.distill_loss import Divergence, TopK, distill_loss
from deepseek_training.compress.teacher_cache import TeacherCache
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.trainer.held_out import HeldOutSet
from deepseek_training.trainer.stage_trainer import StageTrainer

_IDS, _LOG_PROBS = "teacher_ids", "teacher_log_probs"


class TaughtBlocks(torch.utils.data.Dataset):
    """The first blocks of a data set, with the teacher's distributions where there is a cache.

    Args:
        blocks: `[blocks, S]`.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks
        self.cache: TeacherCache | None = None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def identity(self) -> str:
        """A hash of the content."""
        return hash_array(self.blocks.numpy())

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index].long()
        row = {"input_ids": block, "labels": block}
        if self.cache is None:
            return row
        known = self.cache.read(index)
        return {**row, _IDS: known.ids, _LOG_PROBS: known.log_probs}


class DistillTrainer(StageTrainer):
    """Trains on the cross-entropy and on a divergence from the teacher.

    Args:
        recipe: The settings.
        held_out: As for `StageTrainer`.
        dataset: Blocks; with the teacher's distributions, or `teacher` is a model.
        teacher: Asked for each batch; None where the blocks bring what it says, or nothing is asked of it.
        **kwargs: As for `StageTrainer`.
    """

    def __init__(
        self,
        recipe: DistillRecipe,
        held_out: Sequence[HeldOutSet],
        *,
        dataset: TaughtBlocks,
        teacher: PreTrainedModel | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(recipe, held_out, dataset=dataset, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that Trainer counts the targets of a whole step, of any model
        self.divergence = divergence_of(recipe)
        self.teacher = teacher

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of one pass; the passes of an optimizer step add up to its mean over all targets."""
        inputs = dict(inputs)
        labels = inputs.pop("labels")
        teacher = self._ask(inputs)
        output = model(**inputs, use_cache=False)
        loss = distill_loss(
            output.logits,
            teacher,
            labels,
            divergence=self.divergence,
            weight=self.recipe.distill_weight,
            num_items=num_items_in_batch,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # which then takes the mean over processes
        return (loss, output) if return_outputs else loss

    @torch.no_grad()
    def _ask(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor | TopK:
        """What the teacher says of a batch; what came with it is taken out of the inputs."""
        if _IDS in inputs:
            ids = inputs.pop(_IDS)
            return TopK(inputs.pop(_LOG_PROBS), ids)
        if self.teacher is None:
            return torch.empty(0)  # weight 0
        return self.teacher(input_ids=inputs["input_ids"], use_cache=False).logits


def divergence_of(recipe: DistillRecipe) -> Divergence:
    """Return how a recipe compares the two models."""
    return Divergence(recipe.divergence, 0.5 if recipe.beta is None else recipe.beta, recipe.temperature)
