"""Where a callback stands among a trainer's others, and what it is not told about the trainer's step.

`ExpertBalanceCallback` and `TrainingFigures` use it. Surprising: it looks into its callers, for `Trainer`
(transformers 5.23) puts a user's callbacks behind its trackers and tells them neither the trainer nor their place.
"""

import sys

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler


def move_before_trackers(callback: TrainerCallback) -> list[TrainerCallback]:
    """Move a callback ahead of all that read the log, and return the trainer's callbacks; none outside a trainer.

    To be called directly from `on_train_begin`. Callbacks that move, marked by `reads_before_trackers`, keep their
    order. Moving forward in the list that is being gone through neither skips nor repeats a callback.

    Args:
        callback: The caller.
    """
    handler = sys._getframe(2).f_locals.get("self")
    if not isinstance(handler, CallbackHandler):
        return []
    callbacks, place = handler.callbacks, 0
    while getattr(callbacks[place], "reads_before_trackers", False) and callbacks[place] is not callback:
        place += 1
    if callbacks[place] is not callback:
        callbacks.remove(callback)
        callbacks.insert(place, callback)
    return callbacks


def passes_of_this_step(args: TrainingArguments) -> int:
    """Return how many passes make the optimizer step that begins: fewer than usual where an epoch ends.

    To be called from `on_step_begin`, at any depth; outside a trainer's handler it is the number set.

    Args:
        args: The trainer's arguments.
    """
    trainer = _find_trainer()
    # What the trainer divides its own loss by. The place in the epoch does not follow from the callback's arguments:
    # with ignore_data_skip a resumed epoch begins anew at any global step.
    return args.gradient_accumulation_steps if trainer is None else trainer.current_gradient_accumulation_steps


def _find_trainer() -> Trainer | None:
    """Return whose handler called the callback that called this; None if no trainer's did."""
    frame = sys._getframe(2)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    while frame is not None and isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    caller = None if frame is None else frame.f_locals.get("self")
    return caller if isinstance(caller, Trainer) else None
