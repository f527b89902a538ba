"""Which routed experts matter, of any family: by how much they add to their layer (REAP), or how often they are used.

Both are measured in one pass over calibration text, on the slots that a token uses: an unused slot of a dynamic number
of experts has weight 0 or no expert's index, and its expert adds nothing.

    S_j = mean over the tokens routed to j of w_j ||f_j(x)||,    w = the router's weights, made to sum to 1 per token

Axes: T tokens, K slots, E experts, D hidden.

Reference:
    Lasby et al. 2025, arXiv 2510.13999 (REAP, equation 5).
"""

from typing import Any

import torch
from torch import nn

from modeling_deepseek.families import MoeLayer


class ExpertSaliency:
    """Collects over forward passes what one layer's experts add.

    Args:
        layer: A layer of routed experts.
        num_experts: E.

    Raises:
        ValueError: The family has no experts module that can be asked.
    """

    def __init__(self, layer: MoeLayer, num_experts: int) -> None:
        if layer.experts is None:
            raise ValueError(f"shrink: {layer.name}: got experts without a module, expected one that can be called")
        self.experts = layer.experts
        self.sums = torch.zeros(num_experts, dtype=torch.float64)
        self.counts = torch.zeros(num_experts, dtype=torch.int64)
        self.num_tokens = 0
        self._handle = self.experts.register_forward_pre_hook(self._see, with_kwargs=True)

    @property
    def reap(self) -> torch.Tensor:
        """`[E]`: the saliency; 0 for an expert that no token came to."""
        return self.sums / self.counts.clamp(min=1)

    @property
    def frequency(self) -> torch.Tensor:
        """`[E]`: the share of tokens that use the expert."""
        return self.counts.double() / max(1, self.num_tokens)

    def close(self) -> None:
        """Stop collecting."""
        self._handle.remove()

    @torch.no_grad()
    def _see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, indices, weights = read_call(args, kwargs)
        is_used = (weights > 0) & (indices < len(self.sums))
        shares = weights.double().masked_fill(~is_used, 0.0)
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-30)
        ones = torch.ones_like(weights[:, :1])
        for slot in range(indices.shape[1]):
            chosen, used = indices[:, slot : slot + 1], is_used[:, slot]
            # The class's own forward, past the hooks: one expert per token, unweighted.
            output = type(module).forward(module, hidden, chosen, ones)
            norms = output.float().norm(dim=-1).double()
            experts = chosen[used, 0].cpu()
            self.sums.index_add_(0, experts, (shares[:, slot] * norms)[used].cpu())
            self.counts += torch.bincount(experts, minlength=len(self.counts))
        self.num_tokens += len(hidden)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return `hidden_states` `[T, D]`, `topk_indices` and `topk_weights` `[T, K]` of a call of an experts module.

    Args:
        args: The call's.
        kwargs: The call's.

    Raises:
        ValueError: The family calls its experts in another way.
    """
    names = ("hidden_states", "top_k_index", "top_k_weights")
    values = [*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs)]
    if len(values) != len(names) or any(not isinstance(value, torch.Tensor) for value in values):
        raise ValueError("experts: got some that are called otherwise, expected (hidden, indices, weights)")
    hidden, indices, weights = values
    hidden = hidden.reshape(-1, hidden.shape[-1])
    if indices.shape != weights.shape or len(indices) != len(hidden):
        raise ValueError(
            f"experts: got indices {tuple(indices.shape)} and weights {tuple(weights.shape)} of {len(hidden)} tokens, "
            "expected [tokens, slots] of both"
        )
    return hidden, indices, weights
