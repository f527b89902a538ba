"""Ends an adaptation when general text is being forgotten, and gives back the model as it was before.

At each measurement (``eval_steps``, and the last step) with

    loss = max over general sets of bits per byte now / bits per byte before training - 1

the training goes on while `loss <= bound`; the first measurement above it ends the training, and the weights of the
last one within it are put back. They lie in a file beside the checkpoints, so that a run that was killed ends with
what one that was left alone ends with.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.checkpoints import wait_for_all

FILE = "within_bound.pt"


class StopAtForgetting(TrainerCallback):
    """Ends the training at a loss of general text, and keeps the weights from before.

    Args:
        trainer: A stage's; its model is not sharded.
        before: General bits per byte before the training, by set.
        bound: The relative loss that is let pass.

    Attributes:
        kept_step: The step whose weights the result has.
        stopped_at: The step whose measurement ended the training; None where none did.

    Raises:
        ValueError: The model is sharded, or there is no general text that is held out.
    """

    def __init__(self, trainer: Any, before: Mapping[str, BitsPerByte], bound: float) -> None:
        if trainer.is_sharded:
            raise ValueError(f"stop_general_loss: got {bound} with a model sharded over processes, expected null")
        if not before:
            raise ValueError(f"stop_general_loss: got {bound}, expected null; no general text is held out")
        self.trainer, self.before, self.bound = trainer, before, bound
        self.path = Path(trainer.args.output_dir, FILE)
        self.kept_step = 0
        self.stopped_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the first weights, or find what an interrupted run has kept."""
        if state.global_step == 0 or not self.path.exists():
            self._keep(state.global_step)
            return
        self.kept_step, stopped_at, _ = self._read()
        if stopped_at == state.global_step:
            self.stopped_at, self.trainer.is_over = stopped_at, True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Measure after the last step too."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        **kwargs: Any,
    ) -> TrainerControl:
        """Keep these weights, or end the training."""
        losses = [metrics[f"eval_{name}_bits_per_byte"] / value.value - 1 for name, value in self.before.items()]
        if max(losses) <= self.bound:
            self._keep(state.global_step)
        else:
            self.stopped_at = state.global_step
            self._write({**self._file(), "stopped_at": self.stopped_at})
            control.should_training_stop = control.should_save = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model the weights that were kept, if this has ended the training."""
        if self.stopped_at is not None:
            self.kept_step, _, weights = self._read()
            self.trainer.model.load_state_dict(weights, strict=False)

    @property
    def details(self) -> dict[str, Any]:
        """What the summary tells of it."""
        return {"kept_step": self.kept_step, "stopped_at_step": self.stopped_at}

    def _keep(self, step: int) -> None:
        model = self.trainer.model
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        weights = {name: value for name, value in model.state_dict().items() if name not in frozen}
        self._write({"step": step, "stopped_at": None, "weights": weights})
        self.kept_step = step

    def _write(self, content: dict[str, Any]) -> None:
        if self.trainer.is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_suffix(".partial")
            torch.save(content, partial)
            partial.rename(self.path)
        wait_for_all()

    def _file(self) -> dict[str, Any]:
        return torch.load(self.path, map_location="cpu", weights_only=True)

    def _read(self) -> tuple[int, int | None, dict[str, torch.Tensor]]:
        content = self._file()
        return content["step"], content["stopped_at"], content["weights"]
