"""The experts for one to four tokens: matrix times vector, slot by slot, without sorting anything.

At such sizes time is the reading of the chosen experts' weights, once each. Two kernels read them in slot order, a
third (`combine`) adds up. No tensor cores; a 16-row tile would multiply 15 rows of zeros, while FMA on
wide loads already waits for memory. They serve training as well, so that a pass with gradients gives the same bits as
one without; then the pre-activation is written in the order of the sorted rows.

S slots, H hidden, I expert width, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.combine import combine
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata
from deepseek_kernels.gpu.triton_epilogue import epilogue_constants, gated
from deepseek_kernels.gpu.triton_numerics import LAUNCH, TRITON_DTYPES, accumulator, narrow

MAX_TOKENS = 4
BLOCK_N, BLOCK_K = 16, 256


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
    rows = hidden_states.new_empty(num_rows, hidden)
    slot_row = torch.empty(num_rows, dtype=torch.int32, device=hidden_states.device)
    constants = decode_constants(hidden_states.dtype, hidden, width)
    decode_gate_up_kernel[(num_rows, triton.cdiv(width, BLOCK_N))](
        hidden_states,
        gate_up_proj,
        bias,
        topk_indices,
        activated,
        slot_row,
        preactivation,
        slot_row if metadata is None else metadata.slot_row,
        num_experts=num_experts,
        SLOTS=num_slots,
        **epilogue_constants(activation),
        KEEP=metadata is not None,
        **constants,
        **LAUNCH,
    )
    decode_down_kernel[(num_rows, triton.cdiv(hidden, BLOCK_N))](
        activated, down_proj, slot_row, topk_indices, rows, **constants, **LAUNCH
    )
    return combine(rows, slot_row, num_slots, topk_weights), preactivation


def decode_constants(dtype: torch.dtype, hidden: int, width: int) -> dict[str, Any]:
    """Both kernels' compile-time arguments, for launches and for compile-only checks."""
    return {
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
    slot_row_ptr,
    preactivation_ptr,
    sorted_row_ptr,
    num_experts: tl.constexpr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KEEP: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One slot by `BLOCK_N` columns of gate and up; also tells `combine` which slots are used."""
    slot = tl.program_id(0).to(tl.int64)
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    is_used = (expert >= 0) & (expert < num_experts)
    if tl.program_id(1) == 0:
        tl.store(slot_row_ptr + slot, tl.where(is_used, slot, -1).to(tl.int32))
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
    if KEEP:
        h_ptrs = preactivation_ptr + tl.load(sorted_row_ptr + slot).to(tl.int64) * 2 * WIDTH + places
        tl.store(h_ptrs, gate_h, mask=is_column)
        tl.store(h_ptrs + UP, up_h, mask=is_column)
    activated = gated(gate_h, up_h, ACTIVATION, LIMIT, ALPHA, SHIFT, ACC)
    tl.store(activated_ptr + slot * WIDTH + columns, narrow(activated, DTYPE), mask=is_column)


@triton.jit
def decode_down_kernel(
    activated_ptr,
    weight_ptr,
    slot_row_ptr,
    ids_ptr,
    rows_ptr,
    HIDDEN: tl.constexpr,
    WIDTH: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One slot by `BLOCK_N` columns of the output."""
    slot = tl.program_id(0).to(tl.int64)
    if tl.load(slot_row_ptr + slot) < 0:
        return
    expert = tl.load(ids_ptr + slot).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + (expert * HIDDEN + columns)[:, None] * WIDTH + inner[None, :]
    activated_ptrs = activated_ptr + slot * WIDTH + inner
    total = tl.zeros((BLOCK_N, BLOCK_K), dtype=ACC)
    for k in range(0, WIDTH, BLOCK_K):
        is_inner = inner < WIDTH - k
        activated = tl.load(activated_ptrs, mask=is_inner, other=0.0).to(ACC)[None, :]
        mask = (columns < HIDDEN)[:, None] & is_inner[None, :]
        total += tl.load(weight_ptrs, mask=mask, other=0.0).to(ACC) * activated
        activated_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    tl.store(rows_ptr + slot * HIDDEN + columns, narrow(tl.sum(total, 1), DTYPE), mask=columns < HIDDEN)
