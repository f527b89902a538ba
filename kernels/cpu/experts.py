"""The routed experts on a CPU: one pass over the experts, every buffer reused.

``fused_moe`` calls `forward` and `backward` for CPU tensors. For each expert in turn the rows routed to it are
gathered into a buffer that stays in the cache, multiplied, activated in place, multiplied again and added to the
output. Nothing of size [S, H] is ever made.

Surprising: the arithmetic is not what costs. A fresh 50 MB buffer costs 15 ms of page faults, as much as a third of
the matrix products it feeds (2 cores of AMD EPYC 9004, 2026-11), hence the one buffer per expert, and for what has
to be large ``large_buffers``.

T tokens, K slots per token, S = T*K rows, R = rows used, H hidden, I expert width, E experts.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek_kernels.cpu import large_buffers, staged
from deepseek_kernels.cpu.low_rank import NO_ADAPTERS, Adapters
from deepseek_kernels.cpu.products import accumulation_dtype, linear, outer_into
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.slot_order import SlotOrder


def route(topk_indices: Tensor, num_experts: int, max_rows: int | None = None) -> SlotOrder:
    """Sort the slots by expert, keeping their order within one expert; unused ones follow behind.

    Args:
        topk_indices: [T, K]; at or above `num_experts` means unused.
        num_experts: E.
        max_rows: At most so many slots are used; None for any number.

    Raises:
        ValueError: An index is negative, or more slots are used.
    """
    experts = topk_indices.reshape(-1).to(torch.int64)
    if experts.numel() and int(experts.min()) < 0:
        raise ValueError(f"topk_indices: got {int(experts.min())}, expected 0 or more (E or more means unused)")
    experts = experts.clamp(max=num_experts)
    num_slots = experts.numel()
    row_slot = experts.argsort(stable=True)
    slot_row = torch.empty(num_slots, dtype=torch.int32)
    slot_row[row_slot] = torch.arange(num_slots, dtype=torch.int32)
    expert_start = torch.zeros(num_experts + 1, dtype=torch.int32)
    expert_start[1:] = torch.bincount(experts, minlength=num_experts)[:num_experts].cumsum(0)
    slot_row[experts == num_experts] = -1
    used = int(expert_start[-1])
    if max_rows is not None and used > max_rows:
        raise ValueError(f"topk_indices: got {used} used slots, expected at most max_rows, {max_rows}")
    return SlotOrder(row_slot[:max_rows].to(torch.int32), slot_row, expert_start)


def forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    order: SlotOrder,
    topk_weights: Tensor,
    activation: str,
    keep_preactivation: bool,
    gate_up_bias: Tensor | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """Return the experts' weighted sum and, for the backward pass, the pre-activation of every row.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        order: From `route`.
        topk_weights: [T, K].
        activation: Text of the epilogue.
        keep_preactivation: Whether the second result is wanted; else it is empty.
        gate_up_bias: [E, 2I].
        adapters: Of both projections.

    Returns:
        Output [T, H] and pre-activation [S, 2I], of which the rows of unused slots are never written.
    """
    num_rows, num_slots = order.row_slot.numel(), topk_weights.shape[1]
    width, hidden = down_proj.shape[2], down_proj.shape[1]
    dtype, accumulate = hidden_states.dtype, accumulation_dtype(hidden_states.dtype)
    counts = order.counts()
    if staged.is_small(num_rows, hidden, width, dtype) and num_rows:
        return staged.forward(
            hidden_states,
            gate_up_proj,
            down_proj,
            order,
            counts,
            topk_weights,
            activation,
            keep_preactivation,
            gate_up_bias,
            adapters,
        )
    most, epilogue = max(counts), Epilogue.read(activation)
    row_token = order.row_slot // num_slots
    row_weight = topk_weights.reshape(-1)[order.row_slot].to(accumulate).unsqueeze(1)

    output = torch.zeros(hidden_states.shape, dtype=accumulate)
    kept = large_buffers.empty(num_rows if keep_preactivation else 0, 2 * width, dtype=dtype)
    x = torch.empty(most, hidden, dtype=dtype)
    a = torch.empty(most, width, dtype=dtype)
    for expert, rows, tokens, weight in _experts(counts, row_token, row_weight):
        count = tokens.shape[0]
        x_e = torch.index_select(hidden_states, 0, tokens, out=x[:count])
        h_e = linear(x_e, gate_up_proj[expert])
        if gate_up_bias is not None:
            h_e = h_e.add_(gate_up_bias[expert])
        if adapters.gate_up is not None:
            adapters.gate_up.add_one(expert, rows, x_e, h_e)
        if keep_preactivation:
            kept[rows] = h_e
        a_e = _gated(h_e, weight, epilogue, a[:count])
        y_e = linear(a_e, down_proj[expert])
        if adapters.down is not None:
            adapters.down.add_one(expert, rows, a_e, y_e)
        output.index_add_(0, tokens, y_e.to(accumulate))
    return output.to(dtype), kept


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    order: SlotOrder,
    topk_weights: Tensor,
    preactivation: Tensor,
    activation: str,
    needs: list[bool],
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of hidden states, both weights, router weights and the first product's bias.

    Args:
        grad_output: [T, H].
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        order: As in `forward`.
        topk_weights: [T, K].
        preactivation: Second result of `forward`.
        activation: Text of the epilogue.
        needs: Which of the five gradients are wanted; the others come back empty.
        adapters: Of both projections; their gradients are filled too.
    """
    needs_x, needs_gate_up, needs_down, needs_weights, needs_bias = needs
    num_slots, width, hidden = topk_weights.shape[1], down_proj.shape[2], down_proj.shape[1]
    dtype, accumulate = hidden_states.dtype, accumulation_dtype(hidden_states.dtype)
    counts = order.counts()
    num_rows = order.row_slot.numel()
    grad_gate_up = _empty_gradient(gate_up_proj, counts, needs_gate_up)
    grad_down = _empty_gradient(down_proj, counts, needs_down)
    grad_bias = torch.zeros((len(counts), 2 * width) if needs_bias else (0,), dtype=dtype)
    if staged.is_small(num_rows, hidden, width, dtype) and num_rows:
        grad_x, grad_row_weight = staged.backward(
            grad_output,
            hidden_states,
            gate_up_proj,
            down_proj,
            order,
            counts,
            topk_weights,
            preactivation,
            activation,
            (grad_gate_up, grad_down, grad_bias),
            needs,
            adapters,
        )
        grad_x = hidden_states.new_empty(0) if grad_x is None else grad_x
        grad_weights = _by_slot(grad_row_weight, order, topk_weights, needs_weights)
        return grad_x, grad_gate_up, grad_down, grad_weights, grad_bias
    for adapter in adapters:
        if adapter is not None:
            adapter.make_gradients()
    most, epilogue = max(counts), Epilogue.read(activation)
    row_token = order.row_slot // num_slots
    row_weight = topk_weights.reshape(-1)[order.row_slot].to(accumulate).unsqueeze(1)

    grad_x = torch.zeros(hidden_states.shape if needs_x else (0,), dtype=accumulate)
    grad_row_weight = torch.zeros(row_weight.shape[0] if needs_weights else 0, dtype=accumulate)
    needs_inputs = needs_gate_up or adapters.gate_up is not None
    gathered = torch.empty(most, hidden, dtype=dtype)
    a = torch.empty(most, width, dtype=accumulate)
    activated = torch.empty(most, width, dtype=accumulate)
    grad_h = torch.empty(most, 2 * width, dtype=accumulate)
    for expert, rows, tokens, weight in _experts(counts, row_token, row_weight):
        count = tokens.shape[0]
        a_e, activated_e, grad_h_e = a[:count], activated[:count], grad_h[:count]
        grad_y_e = torch.index_select(grad_output, 0, tokens, out=gathered[:count])
        grad_a_e = torch.mm(grad_y_e, down_proj[expert])

        h_e = preactivation[rows].to(accumulate)
        gate, up = epilogue.split(h_e)
        epilogue.activate_into(gate, activated_e)
        torch.mul(activated_e, up, out=a_e)
        if adapters.down is not None:
            adapters.down.backward_one(expert, rows, grad_y_e, (a_e * weight).to(dtype), grad_a_e)
        grad_a_e = grad_a_e.to(accumulate)
        if needs_weights:
            torch.linalg.vecdot(grad_a_e, a_e, out=grad_row_weight[rows])
        if needs_down:
            outer_into(grad_y_e, a_e.mul_(weight).to(dtype), grad_down[expert])
        if not (needs_x or needs_inputs or needs_bias):
            continue

        grad_a_e.mul_(weight)
        grad_gate_e, grad_up_e = epilogue.columns(grad_h_e)
        torch.mul(grad_a_e, activated_e, out=grad_up_e)
        epilogue.activate_backward_into(grad_a_e.mul_(up), gate, grad_gate_e)
        epilogue.mask_gradient(grad_gate_e, grad_up_e, h_e)
        if needs_bias:
            grad_bias[expert] = grad_h_e.sum(0)
        grad_h_e = grad_h_e.to(dtype)
        grad_x_e = torch.mm(grad_h_e, gate_up_proj[expert]) if needs_x else None
        if needs_inputs:
            x_e = torch.index_select(hidden_states, 0, tokens, out=gathered[:count])
        if needs_gate_up:
            outer_into(grad_h_e, x_e, grad_gate_up[expert])
        if adapters.gate_up is not None:
            adapters.gate_up.backward_one(expert, rows, grad_h_e, x_e, grad_x_e)
        if grad_x_e is not None:
            grad_x.index_add_(0, tokens, grad_x_e.to(accumulate))
    grad_weights = _by_slot(grad_row_weight, order, topk_weights, needs_weights)
    return grad_x.to(dtype), grad_gate_up, grad_down, grad_weights, grad_bias


def _experts(counts: list[int], row_token: Tensor, row_weight: Tensor) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Yield expert, its slice of rows, their tokens and their router weights, leaving empty experts out."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            rows = slice(start, start + count)
            yield expert, rows, row_token[rows], row_weight[rows]
            start += count


def _gated(h: Tensor, weight: Tensor, epilogue: Epilogue, out: Tensor) -> Tensor:
    """Write ``weight * activation(gate) * up`` into `out`, rounding once."""
    gate, up = epilogue.split(h.to(weight.dtype))
    if h.dtype == weight.dtype:
        epilogue.activate_into(gate, out)
        return out.mul_(up).mul_(weight)
    epilogue.activate_into(gate, gate)
    return torch.mul(gate.mul_(up), weight, out=out)


def _empty_gradient(weights: Tensor, counts: list[int], is_needed: bool) -> Tensor:
    """A buffer for a weight gradient in which only the experts without rows are set, to zero."""
    if not is_needed:
        return weights.new_empty(0)
    gradient = large_buffers.empty(*weights.shape, dtype=weights.dtype)
    for expert, count in enumerate(counts):
        if count == 0:
            gradient[expert].zero_()
    return gradient


def _by_slot(grad_row_weight: Tensor, order: SlotOrder, topk_weights: Tensor, is_needed: bool) -> Tensor:
    """The router weights' gradient in slot order; zero at unused slots."""
    if not is_needed:
        return topk_weights.new_empty(0)
    gradient = torch.zeros(topk_weights.numel(), dtype=topk_weights.dtype)
    gradient[order.row_slot[: grad_row_weight.numel()]] = grad_row_weight.to(topk_weights.dtype)
    return gradient.view(topk_weights.shape)
