"""The number of experts per token: a cumulative share p, and the PI controller that steers p to a target mean.

`DeepseekRouter` calls it when `min_experts_per_tok < num_experts_per_tok`. The share p moves once per optimizer
step and never within one, or activation checkpointing would recompute a layer with another p than it was run with, and
gradient accumulation would change the result.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init

from .configuration_deepseek import DeepseekConfig

# u = -log(1 - p): for shares that fall geometrically the number of experts is linear in u, where in p it would be
# steeper and steeper towards 1.
_PROPORTIONAL_GAIN = 0.2
_INTEGRAL_GAIN = 0.4
_U_RANGE = (1e-3, 30.0)
# A fresh router's shares are so even that a hair's breadth of p separates 8 experts from 9, a trained one's are not:
# the gain shrinks when the error's sign is not that of its running mean, and grows when it is. The two undo one
# another, or the noise of small batches, which makes either as likely, would bring the gain to nothing, and p would no
# longer follow a router that drifts. Only errors larger than noise shrink it faster: they tell of a step too wide.
_GAIN_RANGE = (1e-3, 10.0)
_GAIN_GROWTH, _GAIN_DECAY, _GAIN_FAST_DECAY = 1.25, 0.8, 0.5
_LARGE_ERROR = 0.1
_MEMORY = 0.3


class ExpertShareController(nn.Module):
    """Keeps each token's best experts until their share reaches p, and steers p.

    With `e = (target - mean) / (max - min)` and its running mean `m`, once per optimizer step::

        g <- 1.25 g if e has the sign of m, else 0.8 g, or 0.5 g where |e| > 0.1
        u <- u + g (0.2 (e - m) + 0.4 e),    p = 1 - exp(-u),    m <- m + 0.3 (e - m)

    The state `[u, m, g]` is one fp32 buffer, saved with the model.

    Args:
        config: The model's configuration.

    Reference:
        DTop-p, arXiv 2512.13996 (a PI controller on p). It steers one p for all layers; here each layer has its own.
    """

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__()
        self.min_experts, self.max_experts = config.min_experts_per_tok, config.num_experts_per_tok
        self.target = config.mean_experts_target
        # Under even shares p = target / max keeps exactly the target.
        self.initial_p = self.target / self.max_experts if config.expert_top_p is None else config.expert_top_p
        self.state = nn.Buffer(torch.zeros(3, dtype=torch.float32))
        self.reset_state()

    @property
    def top_p(self) -> float:
        """The share p in force."""
        return -math.expm1(-float(self.state[0]))

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        """Return which slots are used, `[T, K]` bool.

        Args:
            shares: `[T, K]`, best first, each row summing to 1.
        """
        slots = torch.arange(self.max_experts, device=shares.device)
        # A slot is needed if what lies before it is below p. Put as "what is left, this slot included, exceeds 1 - p",
        # it stays exact for p near 1, where a sum close to 1 loses the small shares.
        left = shares.flip(-1).cumsum(-1).flip(-1)
        return (left > torch.exp(-self.state[0])) | (slots < self.min_experts)

    @torch.no_grad()
    def step(self, mean_experts: float) -> None:
        """Move p once.

        Args:
            mean_experts: Mean number of experts per token since the last step, padding left out.
        """
        if self.target is None:
            return
        error = (self.target - mean_experts) / (self.max_experts - self.min_experts)
        u, mean_error, gain = self.state.tolist()
        if error * mean_error != 0:
            decay = _GAIN_FAST_DECAY if abs(error) > _LARGE_ERROR else _GAIN_DECAY
            gain *= _GAIN_GROWTH if error * mean_error > 0 else decay
            gain = min(max(gain, _GAIN_RANGE[0]), _GAIN_RANGE[1])
        u += gain * (_PROPORTIONAL_GAIN * (error - mean_error) + _INTEGRAL_GAIN * error)
        mean_error += _MEMORY * (error - mean_error)
        self.state.copy_(torch.tensor([min(max(u, _U_RANGE[0]), _U_RANGE[1]), mean_error, gain]))

    @torch.no_grad()
    def reset_state(self) -> None:
        """Return to the initial p."""
        u = math.inf if self.initial_p == 1 else -math.log1p(-self.initial_p)
        init.copy_(self.state, torch.tensor([u if self.target is None else min(u, _U_RANGE[1]), 0.0, 1.0]))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "ExpertShareController":
        before = self.state
        super()._apply(fn, recurse)
        self.state = restore_float32(before, self.state)
        return self


def restore_float32(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return `before` where `after` is: undoes the cast, but not the move, of `Module.to`, `.half`, `.cuda`.

    Args:
        before: The fp32 buffer before the module's `_apply`.
        after: The same buffer after it.
    """
    if after.dtype == torch.float32:
        return after
    if before.is_meta or after.is_meta:
        return torch.empty_like(after, dtype=torch.float32)
    return before.to(after.device)
