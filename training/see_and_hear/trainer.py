"""The trainer of the multimodal stage: first with the language model standing still, then everything."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.recipes.multimodal import MultimodalRecipe
from deepseek_training.see_and_hear.lessons import Collator, Lessons
from deepseek_training.trainer.held_out import HeldOutSet
from deepseek_training.trainer.stage_trainer import StageTraining
from modeling_deepseek.modeling_multimodal import DeepseekMultimodalForConditionalGeneration


class TwoStages(TrainerCallback):
    """Holds the language model still in the first steps: weights, balancing bias and head.

    The optimizer knows of every weight from the start; one without gradient it leaves alone, decay included.

    Args:
        model: The model.
        balance: Moves the balancing bias.
        frozen_steps: How many steps.
    """

    def __init__(
        self, model: DeepseekMultimodalForConditionalGeneration, balance: ExpertBalanceCallback, frozen_steps: int
    ) -> None:
        self.parts = [model.model.language_model, model.lm_head]
        self.balance, self.bias_update_speed = balance, balance.bias_update_speed
        self.frozen_steps = frozen_steps

    def set_stage(self, step: int) -> None:
        """Make ready for a step.

        Args:
            step: Steps that are done.
        """
        is_second = step >= self.frozen_steps
        for part in self.parts:
            for parameter in part.parameters():
                if parameter.is_floating_point():
                    parameter.requires_grad_(is_second)
        self.balance.bias_update_speed = self.bias_update_speed if is_second else 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the stage that the training, new or resumed, begins in."""
        self.set_stage(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Change the stage where its step has come."""
        if state.global_step == self.frozen_steps:
            self.set_stage(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave every weight trainable."""
        self.set_stage(self.frozen_steps)


class MultimodalTrainer(StageTraining, Trainer):
    """Trains on lessons in their order, in two stages.

    Args:
        recipe: The settings.
        held_out: The sets that `evaluate` scores.
        lessons: What is trained on.
        processor: Of the model.
        **kwargs: As for `transformers.Trainer`.
    """

    def __init__(
        self,
        recipe: MultimodalRecipe,
        held_out: Sequence[HeldOutSet],
        *,
        lessons: Lessons,
        processor: Any,
        **kwargs: Any,
    ) -> None:
        evaluated = lessons if recipe.eval_steps else None  # Trainer wants one; `evaluate` reads `held_out`
        super().__init__(
            recipe,
            held_out,
            train_dataset=lessons,
            eval_dataset=evaluated,
            data_collator=Collator(processor),
            **kwargs,
        )
        balance = next(one for one in self.callback_handler.callbacks if isinstance(one, ExpertBalanceCallback))
        self.add_callback(TwoStages(self.model, balance, recipe.frozen_steps))

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        """Lessons have their order."""
        return torch.utils.data.SequentialSampler(self.train_dataset)
