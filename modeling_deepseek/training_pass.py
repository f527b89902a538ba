"""What the layers are told of a training pass: sequences, padding, and the weight of its auxiliary losses.

`DeepseekModel.forward` makes one `TrainingPass` and hands it to every layer, so a layer that activation checkpointing
runs again is told the same.
"""

from typing import NamedTuple

import torch
from torch import nn

from .token_layout import TokenLayout

try:
    from accelerate.state import GradientState
except ImportError:
    GradientState = None


class TrainingPass(NamedTuple):
    """One forward pass in training mode.

    Attributes:
        layout: Sequences and padding of the batch.
        loss_weight: Factor of the auxiliary losses; the factors of one optimizer step's passes add up to 1.
    """

    layout: TokenLayout
    loss_weight: float = 1.0


class PassWeight:
    """Divides the weight 1 of an optimizer step's auxiliary losses among its forward passes.

    With `num_passes` each pass gets `1 / num_passes`. Without it accelerate tells which pass is the last of a step,
    and the last gets what is left of 1. The others get `left / (passes expected to follow)`: as many as the longest
    step had, and in the first step as many as have gone by, that is 1/2, 1/6, 1/12, ... Outside accelerate every pass
    counts as the last and gets 1. A compiled forward also gets 1: a number that changes would compile it anew.

    Attributes:
        num_passes: Passes per optimizer step where something has told (`set_accumulation_steps`), else None.
    """

    # Where accelerate never reports a last pass, begin a new step rather than give weights near 0.
    _LONGEST_STEP = 4096

    def __init__(self) -> None:
        self.num_passes: int | None = None
        self._longest = 0
        self._begin_step()

    def _begin_step(self) -> None:
        self._left, self._num_seen = 1.0, 0

    def take(self) -> float:
        """Return the weight of the pass that begins."""
        if self.num_passes is not None:
            return 1 / self.num_passes
        if torch.compiler.is_compiling():
            return 1.0
        if _is_last_pass() or self._num_seen >= self._LONGEST_STEP:
            weight = self._left
            self._longest = max(self._longest, self._num_seen + 1)
            self._begin_step()
            return weight
        num_to_come = self._longest - self._num_seen  # this one included; at least 2, for it is not the last
        weight = self._left / (num_to_come if num_to_come > 1 else self._num_seen + 2)
        self._left -= weight
        self._num_seen += 1
        return weight


def _is_last_pass() -> bool:
    return GradientState is None or GradientState().sync_gradients


def set_accumulation_steps(model: nn.Module, num_passes: int | None) -> None:
    """Tell a model of ours how many forward passes make one optimizer step, for the size of its auxiliary losses.

    `ExpertBalanceCallback` calls this before every step. A training loop of your own that accumulates gradients
    without accelerate calls it once.

    Args:
        model: The model, wrapped or not; others than ours are left alone.
        num_passes: At least 1; None where it is no longer known.

    Raises:
        ValueError: `num_passes` is below 1.
    """
    if num_passes is not None and num_passes < 1:
        raise ValueError(f"num_passes: got {num_passes}, expected at least 1")
    for module in model.modules():
        weight = vars(module).get("pass_weight")
        if hasattr(weight, "num_passes"):  # not isinstance: a checkpoint's own copy of this file makes another class
            weight.num_passes = num_passes
