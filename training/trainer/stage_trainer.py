"""The training shared by `pretrain`, `adapt` and `sft`: a `Trainer` in a run folder, with exact resume.

What is ours here: evaluation in bits per byte, the figures of the experts, and going on from the last complete
checkpoint. Surprising: a run that was killed ends with the same bits as one that was not, which holds because the log
window, the data order, the random state and the routers' controllers all restart at a checkpoint.
"""

import contextlib
import dataclasses
import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from deepseek_records.run_folder import RunFolder
from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.expert_load_plot import LoadPlot
from deepseek_training.balance.training_figures import TrainingFigures
from deepseek_training.data.packing import cut_to_share, encode_documents
from deepseek_training.recipes.loading import recipe_settings
from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings
from deepseek_training.trainer.bits_per_byte import BitsPerByte, measure_model
from deepseek_training.trainer.checkpoints import CheckpointMarker, last_complete_checkpoint, load_weights, step_of
from deepseek_training.trainer.divergence import StopWhenDiverged
from deepseek_training.trainer.engine import check_engine, prepare_engine
from deepseek_training.trainer.run_callbacks import MetricsFile, ProgressBar, drop_metrics_after

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A held-out set as it is scored.

    Attributes:
        name: As it appears in the figures.
        texts: The texts.
        documents: Their tokens.
        num_bytes: Their UTF-8 bytes.
    """

    name: str
    texts: list[str]
    documents: Sequence[np.ndarray]
    num_bytes: int

    @classmethod
    def prepare(cls, name: str, texts: Sequence[str], tokenizer: Any, max_bytes: int | None) -> "HeldOut":
        """Return the set, shortened to `max_bytes` and encoded."""
        texts = cut_to_share(texts, max_bytes)
        return cls(name, texts, encode_documents(texts, tokenizer), sum(len(text.encode()) for text in texts))

    def measure(self, model: Any, recipe: TrainerSettings) -> BitsPerByte:
        """Return the model's bits per byte on this set."""
        return measure_model(
            model,
            self.documents,
            self.num_bytes,
            sequence_length=recipe.sequence_length,
            batch_size=recipe.batch_size,
        )


class StageTraining:
    """What every stage's trainer does otherwise than the `Trainer` that it is mixed into."""

    figures: TrainingFigures | None = None

    @property
    def is_first(self) -> bool:
        """True in the process that writes the run folder."""
        return self.args.process_index == 0

    @property
    def is_sharded(self) -> bool:
        """True if no process holds the whole model."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled or self.is_distributed_loading_by_transformers

    def save_result(self, run: RunFolder, tokenizer: Any) -> None:
        """Write model and tokenizer into the run folder, gathered from all processes.

        Args:
            run: The run folder.
            tokenizer: Saved beside the model.
        """
        if self.is_sharded:
            self.save_model(str(run.model_path), _internal_call=True)
            (run.model_path / "training_args.bin").unlink(missing_ok=True)
        elif self.is_first:
            self.model.save_pretrained(run.model_path)
        if self.is_first:
            tokenizer.save_pretrained(run.model_path)

    def _run_epoch(self, **kwargs: Any) -> None:
        """Run an epoch unless the training is done already.

        `Trainer` (5.23) looks for the last step only after a step: resumed from its checkpoint it would train one
        too many.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(**kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load a checkpoint's weights by `load_weights`, which knows the experts' names on disk."""
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_weights(self.model if model is None else model, resume_from_checkpoint)


class StageTrainer(StageTraining, Trainer):
    """Evaluates in bits per byte instead of the mean loss of blocks.

    Args:
        recipe: The stage's settings.
        held_out: The sets to score.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(self, recipe: TrainerSettings, held_out: Sequence[HeldOut], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.recipe = recipe
        self.held_out = held_out

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Score every held-out set, log and return ``eval_<name>_bits_per_byte``."""
        metrics = {}
        for held_out in self.held_out:
            measured = held_out.measure(self.model_wrapped, self.recipe)
            metrics[f"eval_{held_out.name}_bits_per_byte"] = measured.value
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def open_run(
    recipe: TrainerSettings, output: str | Path, *, command: str, overwrite: bool = False
) -> tuple[RunFolder, TrainingArguments]:
    """Return the run folder and the trainer's arguments; of several processes the first makes the folder.

    Args:
        recipe: The settings.
        output: The folder.
        command: The subcommand.
        overwrite: Delete whatever run the folder holds.

    Raises:
        FileExistsError: The folder holds another run.
    """
    args = training_arguments(recipe, Path(output))
    settings = recipe_settings(recipe)
    with args.main_process_first(local=False):
        if args.process_index > 0:
            return RunFolder.join(output, settings), args
        run = RunFolder.create(output, settings, command=command, seed=recipe.seed, overwrite=overwrite)
        checkpoint = last_complete_checkpoint(run.path / "checkpoints")
        if run.is_resumed:
            drop_metrics_after(run, step_of(checkpoint) if checkpoint else 0)
    return run, args


def train_stage(
    recipe: TrainerSettings,
    run: RunFolder,
    args: TrainingArguments,
    model: PreTrainedModel,
    dataset: torch.utils.data.Dataset,
    held_out: Sequence[HeldOut],
) -> StageTrainer:
    """Train the model in place, from the run's last complete checkpoint if it has one.

    Args:
        recipe: The settings.
        run: The run folder.
        args: The trainer's arguments, from `open_run`.
        model: The model.
        dataset: Blocks to train on.
        held_out: Sets scored every `eval_steps`.

    Returns:
        The trainer, with the model as it wrapped it and the figures of the experts.
    """
    trainer = StageTrainer(
        recipe,
        held_out,
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=dataset if recipe.eval_steps else None,  # Trainer wants one; `evaluate` reads `held_out`
    )
    run_training(trainer, run)
    return trainer


def run_training(trainer: StageTraining, run: RunFolder) -> None:
    """Train in place, from the run's last complete checkpoint if it has one, with the stage's callbacks.

    Args:
        trainer: A stage's, with its recipe.
        run: The run folder.
    """
    check_engine(trainer.accelerator)
    trainer.remove_callback(PrinterCallback)
    disable_progress_bar()  # "Writing model shards" would break our bar's line at every checkpoint
    trainer.figures = TrainingFigures.attach(trainer, balance=ExpertBalanceCallback(trainer.recipe.bias_update_speed))
    bar = ProgressBar(run.path.name)
    for callback in (MetricsFile(run, trainer.figures), LoadPlot(run), bar, StopWhenDiverged(), CheckpointMarker()):
        trainer.add_callback(callback)
    checkpoint = last_complete_checkpoint(run.path / "checkpoints")
    if checkpoint:
        logger.warning("going on from %s", checkpoint)
        loads = [row["tokens_per_expert"] for row in run.metrics if "tokens_per_expert" in row]
        trainer.figures.tokens_per_expert = loads[-1] if loads else []  # what a finished training has logged last
    try:
        with contextlib.closing(bar):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except KeyboardInterrupt:
        logger.warning("%s", describe_interruption(run))
        raise


def describe_interruption(run: RunFolder) -> str:
    """Return one line on how to go on after Ctrl-C."""
    checkpoint = last_complete_checkpoint(run.path / "checkpoints")
    start = f"step {step_of(checkpoint)}" if checkpoint else "the beginning (no checkpoint was due yet)"
    return f"stopped; run the same command again to go on from {start} in {run.path}"


def choose_trackers(recipe: TrainerSettings) -> list[str]:
    """Return the recipe's trackers, else trackio where it is installed, which needs no account or network."""
    if recipe.report_to is not None:
        return recipe.report_to
    return ["trackio"] if importlib.util.find_spec("trackio") else []


def training_arguments(recipe: TrainerSettings, output: Path) -> TrainingArguments:
    """Return the trainer's arguments for a recipe.

    Args:
        recipe: The settings.
        output: The run folder; checkpoints go into it.
    """
    has_gpu = torch.cuda.is_available()
    return TrainingArguments(
        accelerator_config=prepare_engine(),
        output_dir=str(output / "checkpoints"),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_learning_rate_share},
        warmup_steps=recipe.warmup_steps,
        optim="adamw_torch",
        weight_decay=recipe.weight_decay,
        adam_beta2=recipe.adam_beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        activation_checkpointing=recipe.gradient_checkpointing,
        logging_steps=recipe.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.eval_steps else "no",
        eval_steps=recipe.eval_steps or None,
        save_strategy="steps" if recipe.save_steps else "no",
        save_steps=recipe.save_steps or recipe.max_steps,
        seed=recipe.seed,
        data_seed=recipe.seed,
        use_cpu=not has_gpu,
        dataloader_pin_memory=has_gpu,
        remove_unused_columns=False,
        disable_tqdm=True,  # `ProgressBar` replaces it
        project="deepseek-moe",
        run_name=f"{output.parent.name}-{output.name}",
        report_to=choose_trackers(recipe) or "none",
    )
