"""The routed experts on a CPU for a handful of tokens without gradients: decoding.

``fused_moe`` comes here where at most `MAX_SLOTS` slots are computed and nothing is kept. Each expert's weights are
read once for one to a few rows, so what counts is how fast they stream and how little runs in between.

Surprising: in bf16 neighbouring experts are multiplied as one batch, shorter ones padded with a copy of one of their
own rows. In a batch each thread streams an expert of its own, where single products split every small matrix over all
threads: 8.4 against 10.6 ms for 64 experts of 1024 x 1024 at two rows each (two cores of AMD EPYC 9004, torch 2.13,
2026-11). Only neighbours can be batched without a copy of the weights, and only bf16 gains.

T tokens, K slots a token, R rows with padding, H hidden, I expert width, E experts.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from deepseek_kernels.activations import activation_into
from deepseek_kernels.cpu_products import accumulation_dtype, linear_into

MAX_SLOTS = 256
_MAX_PADDED_ROWS = 4
_MAX_BATCH = 8


@dataclass
class Plan:
    """Which rows are multiplied by which experts.

    Attributes:
        row_slot: Slot of each row, padding included. R integers.
        slot_row: Row of each slot; R for an unused one. S integers.
        batches: First expert, end, and rows of each expert.
    """

    row_slot: list[int]
    slot_row: list[int]
    batches: list[tuple[int, int, int]]


def make_plan(experts: list[int], num_experts: int, max_batch: int = _MAX_BATCH) -> Plan:
    """Group the used slots by expert and neighbouring experts into batches.

    Args:
        experts: Expert of each slot; at or above `num_experts` means unused.
        num_experts: E.
        max_batch: How many experts a batch takes at most; 1 means no padding.

    Raises:
        ValueError: An index is negative.
    """
    slots_of: dict[int, list[int]] = {}
    for slot, expert in enumerate(experts):
        if expert < 0:
            raise ValueError(f"topk_indices: got {expert}, wanted 0 or more (E or more means unused)")
        if expert < num_experts:
            slots_of.setdefault(expert, []).append(slot)
    plan = Plan([], [-1] * len(experts), [])
    order = sorted(slots_of)
    while order:
        first, size, height = order[0], 1, len(slots_of[order[0]])
        for expert in order[1:max_batch]:
            taller = max(height, len(slots_of[expert]))
            if expert != first + size or taller > _MAX_PADDED_ROWS:
                break
            size, height = size + 1, taller
        for expert in order[:size]:
            slots = slots_of[expert]
            for row, slot in enumerate(slots, start=len(plan.row_slot)):
                plan.slot_row[slot] = row
            plan.row_slot += slots + slots[:1] * (height - len(slots))
        plan.batches.append((first, first + size, height))
        order = order[size:]
    plan.slot_row = [len(plan.row_slot) if row < 0 else row for row in plan.slot_row]
    return plan


def forward(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    activation: str,
) -> Tensor:
    """Return the experts' weighted sum, [T, H].

    Args:
        hidden_states: [T, H].
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        topk_indices: [T, K]; at or above E means unused.
        topk_weights: [T, K].
        activation: Canonical name.

    Raises:
        ValueError: An index is negative.
    """
    num_slots, width, dtype = topk_indices.shape[1], down_proj.shape[2], hidden_states.dtype
    accumulate = accumulation_dtype(dtype)
    max_batch = _MAX_BATCH if dtype == torch.bfloat16 else 1
    plan = make_plan(topk_indices.reshape(-1).tolist(), gate_up_proj.shape[0], max_batch)
    if not plan.row_slot:
        return torch.zeros_like(hidden_states)
    slots = torch.tensor(plan.row_slot)
    h = _multiply(hidden_states.index_select(0, slots // num_slots), gate_up_proj, plan)
    gate, up = h.to(accumulate).split(width, dim=1)
    a = torch.empty(len(plan.row_slot), width, dtype=accumulate)
    activation_into(gate, activation, a)
    a.mul_(up).mul_(topk_weights.reshape(-1)[slots].to(accumulate).unsqueeze(1))
    y = _multiply(a.to(dtype), down_proj, plan, num_zeros=1)
    return F.embedding_bag(torch.tensor(plan.slot_row).view(topk_indices.shape), y, mode="sum")


def _multiply(rows: Tensor, weights: Tensor, plan: Plan, num_zeros: int = 0) -> Tensor:
    """Return each row times the transpose of its expert's matrix.

    Args:
        rows: [R, N], in the plan's order.
        weights: [E, M, N].
        plan: From `make_plan`.
        num_zeros: How many rows of zeros follow.
    """
    out = rows.new_empty(rows.shape[0] + num_zeros, weights.shape[1])
    if num_zeros:
        out[rows.shape[0] :].zero_()
    transposed = weights.transpose(1, 2)
    start = 0
    for first, last, height in plan.batches:
        num_experts = last - first
        end = start + num_experts * height
        x, y, start = rows[start:end], out[start:end], end
        if num_experts > 1:
            batch = (num_experts, height, -1)
            torch.bmm(x.view(batch), transposed[first:last], out=y.view(batch))
        else:
            linear_into(x, weights[first], y)
    return out
