"""The experts for one to four tokens: matrix times vector, slot by slot, without sorting anything.

At such sizes time is the reading of the chosen experts' weights, once each. Two kernels read them; the second adds up
a token's slots in their order, as `combine` does. No tensor cores: a 16-row tile would multiply 15 rows of zeros, and
FMA on wide loads already waits for memory. They serve training as well, so that a pass with gradients gives the same
bits as one without; then the pre-activation is written in the order of the sorted rows.

T tokens, S slots, H hidden, I expert width, E experts.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata
from deepseek_kernels.gpu.triton_epilogue import epilogue_constants, gated
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, narrow

MAX_TOKENS = 4
BLOCK_N, BLOCK_K = 16, 256
# Slots of a token whose weights the second kernel loads at once: as many bytes in flight as with one slot per program.
_GROUP = 4


def decode(
    hidden_states: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    topk_indices: Tensor,
    topk_weights: Tensor,
    activation: str,
    metadata: RoutingMetadata | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `fused_moe` returns, and the pre-activation [S, 2I] (empty unless `metadata` says where rows go).

    Args:
        hidden_states: [T, H], T at most `MAX_TOKENS` for it to be worth it.
        gate_up_proj: [E, 2I, H].
        down_proj: [E, H, I].
        topk_indices: [T, K].
        topk_weights: [T, K].
        activation: Text of the epilogue.
        metadata: The sorted order, where a backward pass will need it.
        bias: Of the first product. [E, 2I].
    """
    num_rows, num_slots = topk_indices.numel(), topk_indices.shape[1]
    num_experts, hidden, width = down_proj.shape
    activated = hidden_states.new_empty(num_rows, width)
    preactivation = hidden_states.new_empty(num_rows if metadata else 0, 2 * width)
    output = torch.empty_like(hidden_states)
    shape = (hidden_states.dtype, num_experts, hidden, width, num_slots)
    sorted_row = None if metadata is None else metadata.slot_row
    launch(
        decode_gate_up_kernel,
        (num_rows, ceil_div(width, BLOCK_N)),
        (hidden_states, gate_up_proj, bias, topk_indices, activated, preactivation, sorted_row),
        decode_gate_up_constants,
        *shape,
        activation=activation,
    )
    columns = decode_down_columns(num_slots)
    launch(
        decode_down_kernel,
        (hidden_states.shape[0], ceil_div(hidden, columns)),
        (activated, down_proj, topk_indices, topk_weights, output),
        decode_down_constants,
        *shape,
    )
    return output, preactivation


@functools.cache
def decode_down_columns(num_slots: int) -> int:
    """Columns of a program of the second kernel, which loads the weights of several slots at once."""
    return BLOCK_N // min(_GROUP, triton.next_power_of_2(num_slots))


def decode_gate_up_constants(
    dtype: torch.dtype, num_experts: int, hidden: int, width: int, num_slots: int, *, activation: str
) -> dict[str, Any]:
    """The first kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        **_decode_constants(dtype, num_experts, hidden, width, num_slots),
        **epilogue_constants(activation),
    }


def decode_down_constants(
    dtype: torch.dtype, num_experts: int, hidden: int, width: int, num_slots: int
) -> dict[str, Any]:
    """The second kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        **_decode_constants(dtype, num_experts, hidden, width, num_slots),
        "COLUMNS": decode_down_columns(num_slots),
    }


def _decode_constants(dtype: torch.dtype, num_experts: int, hidden: int, width: int, num_slots: int) -> dict[str, Any]:
    return {
        "num_experts": num_experts,
        "SLOTS": num_slots,
        "HIDDEN": hidden,
        "WIDTH": width,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "BLOCK_N": BLOCK_N,
        "BLOCK_K": BLOCK_K,
        "num_warps": 4,
    }


@triton.jit
def decode_gate_up_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    ids_ptr,
    activated_ptr,
    preactivation_ptr,
    sorted_row_ptr,
    num_experts: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One slot by `BLOCK_N` columns of gate and up."""
    slot = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    is_used = (expert >= 0) & (expert < num_experts)
    if not is_used:
        return
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    if INTERLEAVED:
        places, UP = 2 * columns, 1
    else:
        places, UP = columns, WIDTH
    weight_rows = expert * 2 * WIDTH + places
    gate_ptrs = weight_ptr + weight_rows[:, None] * HIDDEN + inner[None, :]
    up_ptrs = weight_ptr + (weight_rows + UP)[:, None] * HIDDEN + inner[None, :]
    x_ptrs = x_ptr + (slot // SLOTS) * HIDDEN + inner
    gate = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    up = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    for k in range(0, HIDDEN, BLOCK_K):
        is_inner = inner < HIDDEN - k
        mask = (columns < WIDTH)[:, None] & is_inner[None, :]
        x = tl.load(x_ptrs, mask=is_inner, other=0.0).to(ACC)[None, :]
        gate += tl.load(gate_ptrs, mask=mask, other=0.0).to(ACC) * x
        up += tl.load(up_ptrs, mask=mask, other=0.0).to(ACC) * x
        x_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K
        up_ptrs += BLOCK_K
    is_column = columns < WIDTH
    gate_h = tl.sum(gate, 1)
    if bias_ptr is not None:
        gate_h += tl.load(bias_ptr + weight_rows, mask=is_column, other=0.0).to(ACC)
    gate_h = narrow(gate_h, DTYPE)
    up_h = tl.sum(up, 1)
    if bias_ptr is not None:
        up_h += tl.load(bias_ptr + weight_rows + UP, mask=is_column, other=0.0).to(ACC)
    up_h = narrow(up_h, DTYPE)
    if sorted_row_ptr is not None:
        h_ptrs = preactivation_ptr + tl.load(sorted_row_ptr + slot).to(tl.int64) * 2 * WIDTH + places
        tl.store(h_ptrs, gate_h, mask=is_column)
        tl.store(h_ptrs + UP, up_h, mask=is_column)
    activated = gated(gate_h, up_h, ACTIVATION, LIMIT, ALPHA, SHIFT, ACC)
    tl.store(activated_ptr + slot * WIDTH + columns, narrow(activated, DTYPE), mask=is_column)


@triton.jit
def decode_down_kernel(
    activated_ptr,
    weight_ptr,
    ids_ptr,
    topk_weights_ptr,
    output_ptr,
    num_experts: tl.constexpr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token by `COLUMNS` columns of the output: ``BLOCK_N // COLUMNS`` slots at a time, added up in order."""
    GROUP: tl.constexpr = BLOCK_N // COLUMNS
    token_slot = tl.program_id(0).to(tl.int64) * SLOTS
    rows = tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * COLUMNS + rows % COLUMNS
    inner, group = tl.arange(0, BLOCK_K), tl.arange(0, GROUP)
    output = tl.zeros((COLUMNS,), dtype=ACC)
    for first in range(0, SLOTS, GROUP):
        k = first + rows // COLUMNS
        expert = tl.load(ids_ptr + token_slot + k, mask=k < SLOTS, other=num_experts).to(tl.int64)
        is_row = (expert >= 0) & (expert < num_experts) & (columns < HIDDEN)
        weight_ptrs = weight_ptr + (expert * HIDDEN + columns)[:, None] * WIDTH + inner[None, :]
        activated_ptrs = activated_ptr + (token_slot + k)[:, None] * WIDTH + inner[None, :]
        total = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
        for step in range(0, WIDTH, BLOCK_K):
            mask = is_row[:, None] & (inner < WIDTH - step)[None, :]
            activated = tl.load(activated_ptrs, mask=mask, other=0.0).to(ACC)
            total += tl.load(weight_ptrs, mask=mask, other=0.0).to(ACC) * activated
            activated_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K
        y = tl.reshape(narrow(tl.sum(total, 1), DTYPE).to(ACC), (GROUP, COLUMNS))
        # An unused slot's weight may be anything, NaN included.
        weights = tl.load(topk_weights_ptr + token_slot + first + group, mask=first + group < SLOTS, other=0.0)
        experts = tl.load(ids_ptr + token_slot + first + group, mask=first + group < SLOTS, other=num_experts)
        weights = tl.where((experts >= 0) & (experts < num_experts), weights.to(ACC), 0.0)
        for i in tl.static_range(GROUP):
            values = tl.sum(tl.where((group == i)[:, None], y, 0.0), 0)
            values *= tl.sum(tl.where(group == i, weights, 0.0), 0)
            output += values
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.store(
        output_ptr + tl.program_id(0).to(tl.int64) * HIDDEN + columns, narrow(output, DTYPE), mask=columns < HIDDEN
    )
