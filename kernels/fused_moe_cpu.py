"""The routed experts on a CPU: one pass over the experts, every buffer reused.

``fused_moe`` calls `forward` and `backward` for CPU tensors. For each expert in turn the rows routed to it are
gathered into a buffer that stays in the cache, multiplied, activated in place, multiplied again and added to the
output. Nothing of size [S, H] is ever made.

Surprising: the arithmetic is not what costs. A fresh 50 MB buffer costs 15 ms of page faults, as much as a third of
the matrix products it feeds (2 cores of AMD EPYC 9004, 2026-11), hence the one buffer per expert, and huge pages for
what has to be large (`empty_large`).

T tokens, K slots a token, S = T*K rows, R = rows used, H hidden, I expert width, E experts.
"""

import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_kernels.activations import activation_backward_into, activation_into

_HUGE_PAGES_FROM_BYTES = 16 * 2**20


@dataclass
class Routing:
    """Which rows each expert gets.

    Attributes:
        row_slot: Flat slot ``t * K + k`` of each row, rows sorted by expert; unused slots at the end. [S] int32.
        counts: Rows per expert. [E] int32.
    """

    row_slot: Tensor
    counts: Tensor


def empty_large(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised CPU tensor, on huge pages where it is large and the system has them.

    134 MB filled for the first time: 36 ms by torch.empty, 8 ms by this (2 cores of AMD EPYC 9004, 2026-11).

    Args:
        shape: Sizes.
        dtype: Element type.
    """
    count = 1
    for size in shape:
        count *= size
    num_bytes = count * dtype.itemsize
    if num_bytes < _HUGE_PAGES_FROM_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def route(topk_indices: Tensor, num_experts: int) -> Routing:
    """Sort the slots by expert, keeping their order within one expert.

    Args:
        topk_indices: [T, K]; at or above `num_experts` means unused.
        num_experts: E.

    Raises:
        ValueError: An index is negative.
    """
    experts = topk_indices.reshape(-1).to(torch.int64)
    if experts.numel() and int(experts.min()) < 0:
        raise ValueError(f"topk_indices: got {int(experts.min())}, wanted 0 or more (E or more means unused)")
    experts = experts.clamp(max=num_experts)
    counts = torch.bincount(experts, minlength=num_experts + 1)[:num_experts]
    return Routing(experts.argsort(stable=True).to(torch.int32), counts.to(torch.int32))


def forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    routing: Routing,
    topk_weights: Tensor,
    activation: str,
    keep_preactivation: bool,
) -> tuple[Tensor, Tensor]:
    """Return the experts' weighted sum and, for the backward pass, the pre-activation of every row.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        routing: From `route`.
        topk_weights: [T, K].
        activation: Canonical name.
        keep_preactivation: Whether the second result is wanted; else it is empty.

    Returns:
        Output [T, H] and pre-activation [S, 2I], of which the rows of unused slots are never written.
    """
    num_rows, num_slots = routing.row_slot.numel(), topk_weights.shape[1]
    width, hidden = down_proj.shape[2], down_proj.shape[1]
    dtype, accumulate = hidden_states.dtype, _accumulation_dtype(hidden_states.dtype)
    counts = routing.counts.tolist()
    most = max(counts)
    row_token = routing.row_slot // num_slots
    row_weight = topk_weights.reshape(-1)[routing.row_slot].to(accumulate).unsqueeze(1)

    output = torch.zeros(hidden_states.shape, dtype=accumulate)
    kept = empty_large(num_rows if keep_preactivation else 0, 2 * width, dtype=dtype)
    x = torch.empty(most, hidden, dtype=dtype)
    h = torch.empty(0 if keep_preactivation else most, 2 * width, dtype=dtype)
    a = torch.empty(most, width, dtype=dtype)
    y = torch.empty(most, hidden, dtype=dtype)
    wide = torch.empty(most, max(hidden, 2 * width), dtype=accumulate) if dtype != accumulate else None

    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        rows = slice(start, start + count)
        x_e, a_e, y_e = x[:count], a[:count], y[:count]
        h_e = kept[rows] if keep_preactivation else h[:count]
        torch.index_select(hidden_states, 0, row_token[rows], out=x_e)
        torch.mm(x_e, gate_up_proj[expert].t(), out=h_e)
        _gate_into(h_e, row_weight[rows], activation, a_e, wide)
        torch.mm(a_e, down_proj[expert].t(), out=y_e)
        output.index_add_(0, row_token[rows], _widened(y_e, wide))
        start += count
    return output.to(dtype), kept


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    routing: Routing,
    topk_weights: Tensor,
    preactivation: Tensor,
    activation: str,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden states, both weights and router weights.

    Args:
        grad_output: [T, H].
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        routing: As in `forward`.
        topk_weights: [T, K].
        preactivation: Second result of `forward`.
        activation: Canonical name.
        needs: Which of the four gradients are wanted; the others come back empty.
    """
    needs_x, needs_gate_up, needs_down, needs_weights = needs
    num_slots, width, hidden = topk_weights.shape[1], down_proj.shape[2], down_proj.shape[1]
    dtype, accumulate = hidden_states.dtype, _accumulation_dtype(hidden_states.dtype)
    counts = routing.counts.tolist()
    most = max(counts)
    row_token = routing.row_slot // num_slots
    row_weight = topk_weights.reshape(-1)[routing.row_slot].to(accumulate).unsqueeze(1)

    grad_x = torch.zeros(hidden_states.shape if needs_x else (0,), dtype=accumulate)
    grad_gate_up = empty_large(*(gate_up_proj.shape if needs_gate_up else (0,)), dtype=dtype)
    grad_down = empty_large(*(down_proj.shape if needs_down else (0,)), dtype=dtype)
    grad_row_weight = torch.zeros(row_weight.shape[0] if needs_weights else 0, dtype=accumulate)
    gathered = torch.empty(most, hidden, dtype=dtype)
    grad_a = torch.empty(most, width, dtype=dtype)
    a = torch.empty(most, width, dtype=accumulate)
    activated = torch.empty(most, width, dtype=accumulate)
    grad_h = torch.empty(most, 2 * width, dtype=accumulate)
    wide = torch.empty(most, max(hidden, 2 * width), dtype=accumulate) if dtype != accumulate else None

    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            if needs_gate_up:
                grad_gate_up[expert].zero_()
            if needs_down:
                grad_down[expert].zero_()
            continue
        rows = slice(start, start + count)
        start += count
        tokens, weight = row_token[rows], row_weight[rows]
        g_e, grad_a_e = gathered[:count], grad_a[:count]
        torch.index_select(grad_output, 0, tokens, out=g_e)
        torch.mm(g_e, down_proj[expert], out=grad_a_e)

        h_e = preactivation[rows].to(accumulate)
        gate, up = h_e[:, :width], h_e[:, width:]
        a_e, act_e, grad_h_e = a[:count], activated[:count], grad_h[:count]
        activation_into(gate, activation, act_e)
        torch.mul(act_e, up, out=a_e)
        grad_a_wide = grad_a_e.to(accumulate)
        if needs_weights:
            torch.linalg.vecdot(grad_a_wide, a_e, out=grad_row_weight[rows])
        if needs_down:
            a_e.mul_(weight)
            torch.mm(g_e.t(), a_e.to(dtype), out=grad_down[expert])
        if not (needs_x or needs_gate_up):
            continue
        grad_a_wide = grad_a_wide.mul_(weight)
        torch.mul(grad_a_wide, act_e, out=grad_h_e[:, width:])
        grad_a_wide.mul_(up)
        activation_backward_into(grad_a_wide, gate, activation, grad_h_e[:, :width])
        grad_h_narrow = grad_h_e.to(dtype)
        if needs_x:
            torch.mm(grad_h_narrow, gate_up_proj[expert], out=g_e)
            grad_x.index_add_(0, tokens, _widened(g_e, wide))
        if needs_gate_up:
            torch.index_select(hidden_states, 0, tokens, out=g_e)
            torch.mm(grad_h_narrow.t(), g_e, out=grad_gate_up[expert])

    grad_weights = torch.empty(0, dtype=topk_weights.dtype)
    if needs_weights:
        grad_weights = torch.zeros(topk_weights.numel(), dtype=topk_weights.dtype)
        grad_weights[routing.row_slot] = grad_row_weight.to(topk_weights.dtype)
        grad_weights = grad_weights.view(topk_weights.shape)
    return grad_x.to(dtype), grad_gate_up, grad_down, grad_weights


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _widened(narrow: Tensor, wide: Tensor | None) -> Tensor:
    """`narrow` in the accumulation type, through the buffer `wide` where the types differ."""
    if wide is None:
        return narrow
    view = wide.view(-1)[: narrow.numel()].view(narrow.shape)
    return view.copy_(narrow)


def _gate_into(h: Tensor, weight: Tensor, activation: str, out: Tensor, wide: Tensor | None) -> None:
    """Write ``weight * activation(gate) * up`` into `out`, rounding once."""
    width = out.shape[1]
    h = _widened(h, wide)
    gate, up = h[:, :width], h[:, width:]
    if wide is None:
        activation_into(gate, activation, out)
        out.mul_(up).mul_(weight)
        return
    activation_into(gate, activation, gate)
    torch.mul(gate.mul_(up), weight, out=gate)
    out.copy_(gate)
