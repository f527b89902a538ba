"""The forward pass of the routed experts on a CPU for a handful of tokens: decoding.

``fused_moe`` comes here where at most `MAX_ROWS` slots are computed. Each expert's weights are read once for one
to a few rows, so what counts is how fast they stream and how little runs in between.

Two or more experts are multiplied as one batch where that pays, shorter ones padded with a copy of one of
their own rows. In a batch each thread streams an expert of its own, where single products split every small matrix
over all threads or do not split it at all. fp32 takes any two experts, by a stride that leads from the one to the
other, and weights times rows instead of rows times weights: 1.0 against 3.3 ms of ``grouped_mm`` for eight matrices
of 1024 x 1024 at two rows each. bf16 takes neighbors only, for other strides leave oneDNN: 1.2 against 1.3 ms (best
of many on two cores of AMD EPYC 9004, torch 2.13, 2026-11).

T tokens, K slots per token, S = T*K slots, R rows with padding, H hidden, I expert width, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_kernels.cpu.low_rank import NO_ADAPTERS, Adapters, LowRank
from deepseek_kernels.cpu.products import accumulation_dtype, linear_into
from deepseek_kernels.epilogue import Epilogue

MAX_ROWS = 256
_MAX_PADDED_ROWS = {torch.float32: 3, torch.bfloat16: 4}
_MAX_BATCH = {torch.float32: 2, torch.bfloat16: 8}


@dataclass
class Plan:
    """Which rows are multiplied by which experts.

    Attributes:
        row_slot: Slot of each row, padding included. R integers.
        slot_row: Row of each slot; R for an unused one. S integers.
        batches: First expert, how far the next is, how many, and the rows of each.
    """

    row_slot: list[int]
    slot_row: list[int]
    batches: list[tuple[int, int, int, int]]


def make_plan(experts: list[int], num_experts: int, dtype: torch.dtype) -> Plan:
    """Group the used slots by expert, and experts into batches.

    Args:
        experts: Expert of each slot; at or above `num_experts` means unused.
        num_experts: E.
        dtype: Of the weights; decides which experts can form a batch.

    Raises:
        ValueError: An index is negative.
    """
    slots_of: dict[int, list[int]] = {}
    for slot, expert in enumerate(experts):
        if expert < 0:
            raise ValueError(f"topk_indices: got {expert}, expected 0 or more (E or more means unused)")
        if expert < num_experts:
            slots_of.setdefault(expert, []).append(slot)
    plan = Plan([], [-1] * len(experts), [])
    for batch in _batches(slots_of, dtype):
        height = max(len(slots_of[expert]) for expert in batch)
        for expert in batch:
            slots = slots_of[expert]
            for row, slot in enumerate(slots, start=len(plan.row_slot)):
                plan.slot_row[slot] = row
            plan.row_slot += slots + slots[:1] * (height - len(slots))
        plan.batches.append((batch[0], batch[-1] - batch[0] if len(batch) == 2 else 1, len(batch), height))
    plan.slot_row = [len(plan.row_slot) if row < 0 else row for row in plan.slot_row]
    return plan


def _batches(slots_of: dict[int, list[int]], dtype: torch.dtype) -> list[list[int]]:
    """Experts to multiply together, ascending within a batch."""
    most, size = _MAX_PADDED_ROWS.get(dtype, 0), _MAX_BATCH.get(dtype, 1)
    few = sorted(expert for expert, slots in slots_of.items() if len(slots) <= most)
    batches = [[expert] for expert, slots in slots_of.items() if len(slots) > most]
    if dtype == torch.float32:
        few.sort(key=lambda expert: len(slots_of[expert]))  # equals together need no padding
        return batches + [sorted(few[i : i + size]) for i in range(0, len(few), size)]
    for expert in few:
        if batches and batches[-1][-1] == expert - 1 and len(batches[-1]) < size and len(slots_of[expert - 1]) <= most:
            batches[-1].append(expert)
        else:
            batches.append([expert])
    return batches


def forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    activation: str,
    row_slot: Tensor | None = None,
    gate_up_bias: Tensor | None = None,
    adapters: Adapters = NO_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """Return the experts' weighted sum, [T, H], and the pre-activation where `row_slot` asks for it.

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        topk_indices: [T, K]; at or above E means unused.
        topk_weights: [T, K].
        activation: Text of the epilogue.
        row_slot: The order in which the pre-activation, [S, 2I], is wanted: a slot for each of its rows.
        gate_up_bias: [E, 2I].
        adapters: Of both projections.

    Raises:
        ValueError: An index is negative.
    """
    num_slots, width, dtype = topk_indices.shape[1], down_proj.shape[2], hidden_states.dtype
    accumulate = accumulation_dtype(dtype)
    # Matrices in 4 bits are read one at a time: no batches, as for a type that has none.
    batched = dtype if isinstance(gate_up_proj, Tensor) else torch.float64
    plan = make_plan(topk_indices.flatten().tolist(), gate_up_proj.shape[0], batched)
    if not plan.row_slot:
        return torch.zeros_like(hidden_states), hidden_states.new_empty(
            0 if row_slot is None else len(row_slot), 2 * width
        )
    slots, slot_row = torch.tensor(plan.row_slot), torch.tensor(plan.slot_row)
    tokens = torch.tensor([slot // num_slots for slot in plan.row_slot])
    kept = None if row_slot is None else slot_row.index_select(0, row_slot)
    x = hidden_states.index_select(0, tokens)
    h = _multiply(x, gate_up_proj, plan)
    if gate_up_bias is not None:
        h[:-1].add_(gate_up_bias.index_select(0, topk_indices.flatten().index_select(0, slots)))
    if adapters.gate_up is not None:
        _add(adapters.gate_up, x, h, plan, kept)
    weight = topk_weights.flatten().index_select(0, slots).to(accumulate)
    epilogue = Epilogue.read(activation)
    gate, up = epilogue.split(h[:-1].to(accumulate))
    a = gate.new_empty(gate.shape)
    epilogue.activate_into(gate, a)
    a = a.mul_(up).mul_(weight.unsqueeze(1)).to(dtype)
    y = _multiply(a, down_proj, plan)
    if adapters.down is not None:
        _add(adapters.down, a, y, plan, kept)
    output = F.embedding_bag(slot_row.view(topk_indices.shape), y, mode="sum")
    return output, h[:0] if kept is None else h.index_select(0, kept)


def _add(adapter: LowRank, rows: Tensor, out: Tensor, plan: Plan, kept: Tensor | None) -> None:
    """Add the adapter's part to `out`, whose last row stays zero, and keep ``rows A^T`` in the order of `kept`."""
    low = _multiply(rows, adapter.a, plan)
    out.add_(_multiply(low[:-1], adapter.b, plan), alpha=adapter.scaling)
    if kept is not None:
        torch.index_select(low, 0, kept, out=adapter.low)


def _multiply(rows: Tensor, weights: Tensor, plan: Plan) -> Tensor:
    """Return each row times the transpose of its expert's matrix, and behind them a row of zeros.

    Args:
        rows: [R, N], in the plan's order.
        weights: [E, M, N].
        plan: From `make_plan`.
    """
    num_rows, (_, num_outputs, num_inputs) = rows.shape[0], weights.shape
    out = rows.new_empty(num_rows + 1, num_outputs)
    out[num_rows].zero_()
    start = 0
    for first, step, size, height in plan.batches:
        end = start + size * height
        x, y, start = rows[start:end], out[start:end], end
        if size == 1:
            linear_into(x, weights[first], y)
            continue
        x, y = x.view(size, height, num_inputs), y.view(size, height, num_outputs)
        if rows.dtype == torch.float32:
            _weights_times_rows(weights[first : first + step + 1 : step], x, y)
        else:
            torch.bmm(x, weights[first : first + size].transpose(1, 2), out=y)
    return out


def _weights_times_rows(matrices: Tensor, x: Tensor, y: Tensor) -> None:
    """Write ``x @ matrices^T`` into `y` as the transpose of ``matrices @ x^T``, which MKL does three times as fast."""
    if x.shape[1] == 1:
        torch.bmm(matrices, x.transpose(1, 2), out=y.transpose(1, 2))
    else:
        y.copy_(torch.bmm(matrices, x.transpose(1, 2)).transpose(1, 2))
