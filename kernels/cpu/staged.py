"""The routed experts on a CPU for small batches: everything but the products on all rows at once.

``cpu/experts.py`` comes here where all rows together still fit the cache or nearly (`MAX_BYTES`): decoding, and small
models. Its own loop runs a dozen operators an expert; for sixteen experts of a 3 M model or sixty-four experts of two
rows each, starting them costs more than what they do. Here an expert costs its products and nothing else.

The weighted sum over a token's rows is an ``embedding_bag``, the fastest gather-and-sum torch has on a CPU
(1.5 ms for 24576 bf16 rows of 512, where gather, multiply and sum take 13; 2 cores of AMD EPYC 9004, 2026-11). Unused
slots point at a row of zeros behind the last.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_kernels.cpu import large_buffers
from deepseek_kernels.cpu.low_rank import NO_ADAPTERS, Adapters
from deepseek_kernels.cpu.products import accumulation_dtype, linear_into, matmul_into, outer_into, takes_groups
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.slot_order import SlotOrder

MAX_BYTES = 48 * 2**20


def is_small(num_rows: int, hidden: int, width: int, dtype: torch.dtype) -> bool:
    """Return whether this path should run.

    Args:
        num_rows: S.
        hidden: H.
        width: I.
        dtype: Of the activations.
    """
    return num_rows * (2 * hidden + 3 * width) * dtype.itemsize <= MAX_BYTES


def forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    order: SlotOrder,
    counts: list[int],
    topk_weights: Tensor,
    activation: str,
    keep_preactivation: bool,
    gate_up_bias: Tensor | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """Return what `cpu.experts.forward` returns.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        order: The slots sorted by expert.
        counts: Rows per expert.
        topk_weights: [T, K].
        activation: Text of the epilogue.
        keep_preactivation: Whether the second result is wanted; else it is empty.
        gate_up_bias: [E, 2I].
        adapters: Of both projections.
    """
    (num_tokens, num_slots), used = topk_weights.shape, sum(counts)
    width, hidden, dtype = down_proj.shape[2], down_proj.shape[1], hidden_states.dtype
    slots = order.row_slot[:used]
    x = _gathered(hidden_states, slots // num_slots)
    # Torch's loop has room for neither rows without use nor the row of zeros.
    grouped = used == order.row_slot.numel() and isinstance(gate_up_proj, Tensor) and isinstance(down_proj, Tensor)
    grouped = grouped and takes_groups(used, len(counts), (hidden, width), dtype)
    if grouped:
        h = F.grouped_mm(x, gate_up_proj.transpose(1, 2), offs=order.expert_start[1:])
    else:
        h = large_buffers.empty(order.row_slot.numel(), 2 * width, dtype=dtype)
        for expert, start, end in _stretches(counts):
            linear_into(x[start:end], gate_up_proj[expert], h[start:end])
    if gate_up_bias is not None:
        for expert, start, end in _stretches(counts):
            h[start:end].add_(gate_up_bias[expert])
    if adapters.gate_up is not None:
        adapters.gate_up.add(counts, x, h[:used])
    a = _gated(h[:used], topk_weights.reshape(-1)[slots], Epilogue.read(activation))
    if grouped:
        y = F.grouped_mm(a, down_proj.transpose(1, 2), offs=order.expert_start[1:])
    else:
        y = large_buffers.empty(used + 1, hidden, dtype=dtype)
        y[used].zero_()
        for expert, start, end in _stretches(counts):
            linear_into(a[start:end], down_proj[expert], y[start:end])
    if adapters.down is not None:
        adapters.down.add(counts, a, y[:used])
    output = _summed(y, order.slot_row, used, num_tokens, num_slots)
    return output, h if keep_preactivation else h.new_empty(0, 2 * width)


def backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    order: SlotOrder,
    counts: list[int],
    topk_weights: Tensor,
    preactivation: Tensor,
    activation: str,
    gradients: tuple[Tensor, Tensor, Tensor],
    needs: list[bool],
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor | None, Tensor | None]:
    """Fill the weight gradients and return those of hidden states and, by row, of the router weights.

    Args:
        grad_output: [T, H].
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        order: The slots sorted by expert.
        counts: Rows per expert.
        topk_weights: [T, K].
        preactivation: From `forward`.
        activation: Text of the epilogue.
        gradients: Where the gradients of `gate_up_proj`, `down_proj` and the first product's bias go.
        needs: As in `cpu.experts.backward`.
        adapters: Of both projections; their gradients are filled too.
    """
    needs_x, needs_gate_up, needs_down, needs_weights, needs_bias = needs
    (num_tokens, num_slots), used = topk_weights.shape, sum(counts)
    width, hidden, dtype = down_proj.shape[2], down_proj.shape[1], hidden_states.dtype
    accumulate = accumulation_dtype(dtype)
    slots = order.row_slot[:used]
    tokens = slots // num_slots
    weight = topk_weights.reshape(-1)[slots].to(accumulate).unsqueeze(1)

    grad_y = _gathered(grad_output, tokens)
    grad_a = large_buffers.empty(used, width, dtype=dtype)
    for expert, start, end in _stretches(counts):
        matmul_into(grad_y[start:end], down_proj[expert], grad_a[start:end])
    epilogue, h = Epilogue.read(activation), preactivation[:used].to(accumulate)
    gate, up = epilogue.split(h)
    activated = large_buffers.empty(used, width, dtype=accumulate)
    epilogue.activate_into(gate, activated)
    a = large_buffers.empty(used, width, dtype=accumulate)
    torch.mul(activated, up, out=a)
    if adapters.down is not None:
        scaled = torch.mul(a, weight, out=large_buffers.empty(used, width, dtype=accumulate)).to(dtype)
        adapters.down.backward(counts, grad_y, scaled, grad_a)
    grad_a = grad_a.to(accumulate)
    grad_row_weight = torch.linalg.vecdot(grad_a, a) if needs_weights else None
    if needs_down:
        scaled = a.mul_(weight).to(dtype)
        for expert, start, end in _stretches(counts):
            outer_into(grad_y[start:end], scaled[start:end], gradients[1][expert])
    needs_inputs = needs_gate_up or adapters.gate_up is not None
    if not (needs_x or needs_inputs or needs_bias):
        return None, grad_row_weight

    grad_h = large_buffers.empty(used, 2 * width, dtype=accumulate)
    grad_gate, grad_up = epilogue.columns(grad_h)
    torch.mul(grad_a.mul_(weight), activated, out=grad_up)
    epilogue.activate_backward_into(grad_a.mul_(up), gate, grad_gate)
    epilogue.mask_gradient(grad_gate, grad_up, h)
    if needs_bias:
        for expert, start, end in _stretches(counts):
            gradients[2][expert] = grad_h[start:end].sum(0)
    grad_h = grad_h.to(dtype)
    if needs_inputs:
        x = torch.index_select(hidden_states, 0, tokens, out=grad_y)
    if needs_gate_up:
        for expert, start, end in _stretches(counts):
            outer_into(grad_h[start:end], x[start:end], gradients[0][expert])
    if not needs_x:
        if adapters.gate_up is not None:
            adapters.gate_up.backward(counts, grad_h, x, None)
        return None, grad_row_weight
    rows = large_buffers.empty(used + 1, hidden, dtype=dtype)
    rows[used].zero_()
    for expert, start, end in _stretches(counts):
        matmul_into(grad_h[start:end], gate_up_proj[expert], rows[start:end])
    if adapters.gate_up is not None:
        adapters.gate_up.backward(counts, grad_h, x, rows[:used])
    return _summed(rows, order.slot_row, used, num_tokens, num_slots), grad_row_weight


def _stretches(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """Yield expert, first row and end, leaving empty experts out."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, start, start + count
            start += count


def _gathered(source: Tensor, tokens: Tensor) -> Tensor:
    rows = large_buffers.empty(tokens.numel(), source.shape[1], dtype=source.dtype)
    return torch.index_select(source, 0, tokens, out=rows)


def _gated(h: Tensor, weight: Tensor, epilogue: Epilogue) -> Tensor:
    """``weight * activation(gate) * up``, rounded once; `h` stays as it is."""
    accumulate, width = accumulation_dtype(h.dtype), h.shape[1] // 2
    gate, up = epilogue.split(h.to(accumulate))
    a = large_buffers.empty(h.shape[0], width, dtype=accumulate)
    epilogue.activate_into(gate, a)
    return a.mul_(up).mul_(weight.to(accumulate).unsqueeze(1)).to(h.dtype)


def _summed(rows: Tensor, slot_row: Tensor, used: int, num_tokens: int, num_slots: int) -> Tensor:
    """Sum each token's rows; unused slots take the row of zeros at `used`."""
    if used < slot_row.numel():
        slot_row = slot_row.masked_fill(slot_row < 0, used)
    return F.embedding_bag(slot_row.view(num_tokens, num_slots), rows, mode="sum")
