"""Where a callback stands among a trainer's others.

`ExpertBalanceCallback` and `TrainingFigures` use it. Surprising: it looks into its caller's caller, for `Trainer`
(transformers 5.23) puts a user's callbacks behind its trackers and tells them neither the trainer nor their place.
"""

import sys

from transformers import TrainerCallback
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
