"""The experts by torch's own grouped product, as a peer for ``deepseek-moe bench kernels``.

Written for the largest speed that ``torch.nn.functional.grouped_mm`` allows: one gather, two grouped products, the
router weights applied to the narrow activation instead of the wide output, one sum. transformers' ``grouped_mm``
applies them to the output. It needs no transformers, so that a machine without it still has a peer.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

import torch
from torch import Tensor, nn


def grouped_mm_loop(experts: nn.Module, hidden_states: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Return the experts' weighted sum [T, H].

    Args:
        experts: Has `gate_up_proj` [E, 2I, H] and `down_proj` [E, H, I].
        hidden_states: [T, H].
        indices: [T, K], every one below E.
        weights: [T, K].
    """
    num_tokens, num_slots = indices.shape
    flat = indices.reshape(-1)
    order = flat.argsort()
    counts = torch.histc(
        flat.float(), bins=experts.gate_up_proj.shape[0], min=0, max=experts.gate_up_proj.shape[0] - 1
    )
    offsets = counts.cumsum(0).to(torch.int32)
    tokens = order // num_slots
    h = torch.nn.functional.grouped_mm(hidden_states[tokens], experts.gate_up_proj.transpose(1, 2), offs=offsets)
    gate, up = h.chunk(2, dim=-1)
    scale = weights.reshape(-1)[order].unsqueeze(1).to(h.dtype)
    y = torch.nn.functional.grouped_mm(
        nn.functional.silu(gate) * up * scale, experts.down_proj.transpose(1, 2), offs=offsets
    )
    return torch.empty_like(y).index_copy(0, order, y).view(num_tokens, num_slots, -1).sum(1)


class PlainExperts(nn.Module):
    """The two weights of a layer of experts, not initialized, where transformers' module is not installed."""

    def __init__(self, *, hidden: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))
