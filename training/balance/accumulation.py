"""How many forward passes make an optimizer step: fewer than usual where an epoch ends.

`ExpertBalanceCallback` asks before each step, for the size of the auxiliary losses.
"""

import math
from collections.abc import Sized

from transformers import Trainer, TrainerState, TrainingArguments


class StepPasses:
    """Follows a trainer through its epochs.

    Args:
        trainer: The trainer, which knows; None where only a callback's arguments are at hand. Those tell it for data
            with a length; for data without one the number set is taken for every step.
    """

    def __init__(self, trainer: Trainer | None) -> None:
        self._trainer = trainer
        self._left: int | None = None  # passes in this epoch; None: not known
        self._is_first_epoch = True

    def begin_epoch(self, args: TrainingArguments, state: TrainerState, train_dataloader: object) -> None:
        """Note how many passes the epoch has, less those that a resumed training skips."""
        is_first, self._is_first_epoch = self._is_first_epoch, False
        self._left = length_of(train_dataloader)
        if self._left is None:
            return
        if is_first and not args.ignore_data_skip:
            per_step = args.gradient_accumulation_steps
            self._left -= state.global_step % max(math.ceil(self._left / per_step), 1) * per_step

    def next_step(self, args: TrainingArguments) -> int:
        """Return how many passes make the optimizer step that begins."""
        if self._trainer is not None:
            return self._trainer.current_gradient_accumulation_steps  # what the trainer divides its own loss by
        per_step = args.gradient_accumulation_steps
        if self._left is None:
            return per_step
        num_passes = max(min(per_step, self._left), 1)
        self._left -= num_passes
        return num_passes


def length_of(dataloader: object) -> int | None:
    """Return a data loader's number of batches; None where it has none, as over an iterable data set."""
    try:
        return len(dataloader) if isinstance(dataloader, Sized) else None
    except TypeError:  # DataLoader has a length by its class, and raises this over an iterable data set
        return None
