"""Ends an adaptation when general text is being forgotten, and gives back the model as it was before.

At each measurement (``eval_steps``, and the last step) with

    loss = max over general sets of bits per byte now / bits per byte before training - 1

the training goes on while `loss <= bound`, and through `patience` measurements in a row above it, since a loss that
rises at once may come back as the learning rate falls. The next one above it ends the training, as does the last
step's. Then the weights of the last measurement within the bound are put back. They lie beside the checkpoints, and so
does what each measurement found, so that a run that was killed ends with what one that was left alone ends with.
"""

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.checkpoints import wait_for_all

FILE, LOOKS_FILE = "within_bound.pt", "within_bound.json"


class StopAtForgetting(TrainerCallback):
    """Ends the training at a loss of general text, and keeps the weights from before.

    Args:
        trainer: A stage's; its model is not sharded.
        before: General bits per byte before the training, by set.
        bound: The relative loss that is let pass.
        patience: Measurements in a row above it that do not end the training.

    Attributes:
        kept_step: The step whose weights the result has.
        stopped_at: The step whose measurement ended the training; None where none did.

    Raises:
        ValueError: The model is sharded, or there is no general text that is held out.
    """

    def __init__(self, trainer: Any, before: Mapping[str, BitsPerByte], bound: float, patience: int = 0) -> None:
        if trainer.is_sharded:
            raise ValueError(f"stop_general_loss: got {bound} with a model sharded over processes, expected null")
        if not before:
            raise ValueError(f"stop_general_loss: got {bound}, expected null; no general text is held out")
        self.trainer, self.before, self.bound, self.patience = trainer, before, bound, patience
        self.path = Path(trainer.args.output_dir, FILE)
        self.looks: list[tuple[int, bool]] = []
        self.kept_step = 0
        self.stopped_at: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the first weights, or find what an interrupted run has kept."""
        if state.global_step == 0 or not self.path.exists():
            self._keep(state.global_step)
            return
        self.kept_step, _ = self._read()
        # An interrupted run may have looked further than its last checkpoint.
        looks = json.loads(self.path.with_name(LOOKS_FILE).read_text())
        self.looks = [(step, is_within) for step, is_within in looks if step <= state.global_step]
        if self._is_over(state):
            self.stopped_at, self.trainer.is_over = state.global_step, True

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
        """Keep these weights, wait, or end the training."""
        losses = [metrics[f"eval_{name}_bits_per_byte"] / value.value - 1 for name, value in self.before.items()]
        is_within = max(losses) <= self.bound
        self.looks.append((state.global_step, is_within))
        self._write(LOOKS_FILE, lambda path: path.write_text(json.dumps(self.looks)))
        if is_within:
            self._keep(state.global_step)
        elif self._is_over(state):
            self.stopped_at = state.global_step
            control.should_training_stop = control.should_save = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give the model the weights that were kept, if this has ended the training."""
        if self.stopped_at is not None:
            self.kept_step, weights = self._read()
            self.trainer.model.load_state_dict(weights, strict=False)

    @property
    def details(self) -> dict[str, Any]:
        """What the summary tells of it."""
        return {"kept_step": self.kept_step, "stopped_at_step": self.stopped_at}

    def _is_over(self, state: TrainerState) -> bool:
        """Whether the last measurements are above the bound: more than are waited for, or at the end."""
        above = sum(1 for _ in itertools.takewhile(lambda look: not look[1], reversed(self.looks)))
        return above > (self.patience if state.global_step < state.max_steps else 0)

    def _keep(self, step: int) -> None:
        model = self.trainer.model
        frozen = {name for name, value in model.named_parameters() if not value.requires_grad}
        weights = {name: value for name, value in model.state_dict().items() if name not in frozen}
        self._write(FILE, lambda path: torch.save({"step": step, "weights": weights}, path))
        self.kept_step = step

    def _write(self, name: str, write: Callable[[Path], Any]) -> None:
        if self.trainer.is_first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = self.path.with_name(f"{name}.partial")
            write(partial)
            partial.rename(self.path.with_name(name))
        wait_for_all()

    def _read(self) -> tuple[int, dict[str, torch.Tensor]]:
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        return content["step"], content["weights"]
