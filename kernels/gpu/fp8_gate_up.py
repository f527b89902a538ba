"""Gather, both up projections in FP8, the activation and its codes: the first of the FP8 forward kernels.

Codes of x are gathered with their scales by pointer; each step's product of 128 inner elements is scaled and added to
sums in fp32. A tile of 128 columns of gate and of up holds whole groups of the activation and writes their codes. A
narrower one, which may have more rows, leaves that to ``fp8_quantize.activate_rows``, which reads h again; its rows of
gate and of up come in one block by one descriptor, and one product of twice the width reads those of x once.

S rows, H hidden, I expert width, E experts, G_H and G_I their groups of 128.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.fp8 import GROUP
from deepseek_kernels.gpu.down_backward import column_halves
from deepseek_kernels.gpu.fp8_quantize import activate_rows, empty_codes, multiply_codes, store_group
from deepseek_kernels.gpu.low_rank_step import LowRankStep, add_low_rank, step_constants, step_operands
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_epilogue import epilogue_constants, gated
from deepseek_kernels.gpu.triton_numerics import LAUNCH, TRITON_DTYPES, narrow
from deepseek_kernels.gpu.weight_blocks import load_block, weight_operand


def gate_up_fp8(
    x: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    metadata: RoutingMetadata,
    num_slots_per_token: int,
    width: int,
    dtype: torch.dtype,
    tile: Tile,
    *,
    activation: str,
    keep_preactivation: bool,
    bias: Tensor | None = None,
    low_rank: LowRankStep | None = None,
    activated_rows: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the activated rows, codes [S, 128 G_I] and scales [S, G_I], and the pre-activation [S, 2I] in `dtype`.

    Args:
        x: Codes [T, 128 G_H] and scales [T, G_H].
        weights: Codes [E, 2 * 128 G_I, 128 G_H] and scales [E, 2 G_I, G_H].
        metadata: From `routing_metadata` with the tile's `block_m`.
        num_slots_per_token: K.
        width: I.
        dtype: Of the result.
        tile: Sizes of the tiles.
        activation: Text of the epilogue.
        keep_preactivation: Whether h is wanted; it is empty otherwise, if the tile needs none.
        bias: [E, 2I].
        low_rank: What an adapter adds before the activation; its factor is [E, 2I, r].
        activated_rows: Where the activated rows go as they are, [S, I] in `dtype`; None where nobody reads them.
    """
    (codes, scales), (matrices, weight_scales) = x, weights
    num_rows, num_experts = metadata.row_slot.numel(), matrices.shape[0]
    is_whole = tile.block_n == GROUP
    keep = keep_preactivation or not is_whole
    preactivation = codes.new_empty(num_rows if keep else 0, 2 * width, dtype=dtype)
    activated = empty_codes(codes, num_rows if is_whole else 0, triton.cdiv(width, GROUP))
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    operand = weight_operand(matrices, tile, tile.block_n, tile.block_k)
    if isinstance(operand, TensorDescriptor) and not is_whole:
        halves = matrices.view(num_experts, 2, -1, matrices.shape[2])
        operand = TensorDescriptor.from_tensor(halves, [1, 2, tile.block_n, tile.block_k])
    if tiles:
        gate_up_fp8_kernel[(tiles * triton.cdiv(width, tile.block_n),)](
            codes,
            scales,
            operand,
            weight_scales,
            bias,
            preactivation,
            *activated,
            activated_rows,
            metadata.row_slot,
            metadata.expert_start,
            metadata.tile_start,
            tiles,
            width,
            *(() if low_rank is None else step_operands(low_rank)),
            **gate_up_fp8_constants(
                dtype,
                num_experts,
                scales.shape[1],
                width,
                num_slots_per_token,
                activation=activation,
                keep_preactivation=keep,
                tile=tile,
                is_descriptor=isinstance(operand, TensorDescriptor),
                rank=0 if low_rank is None else low_rank.rank,
            ),
            **tile.launch_options,
            **LAUNCH,
        )
    if not is_whole:
        activated = activate_rows(preactivation, activation, metadata.expert_start[-1:])
    return activated, preactivation


def gate_up_fp8_constants(
    dtype: torch.dtype,
    num_experts: int,
    groups: int,
    width: int,
    num_slots: int,
    *,
    activation: str,
    keep_preactivation: bool,
    tile: Tile,
    is_descriptor: bool = False,
    rank: int = 0,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    constants = epilogue_constants(activation)
    del constants["INTERLEAVED"]
    return {
        "num_experts": num_experts,
        "GROUPS": groups,
        "WIDTH": width,
        "WIDTH_GROUPS": triton.cdiv(width, GROUP),
        "SLOTS": num_slots,
        "EXPERTS": triton.next_power_of_2(num_experts),
        **constants,
        "KEEP": keep_preactivation,
        "DESCRIPTOR": is_descriptor,
        "DTYPE": TRITON_DTYPES[dtype],
        "PRECISION": matmul_precision(dtype),
        **tile.constants,
        **step_constants(rank),
    }


@triton.jit(do_not_specialize=["num_tiles_bound", "width"])
def gate_up_fp8_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    preactivation_ptr,
    codes_ptr,
    scales_ptr,
    activated_ptr,
    row_slot_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    width,
    low_ptr,
    factor_ptr,
    num_experts: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_GROUPS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    KEEP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of `BLOCK_M` rows of one expert by `BLOCK_N` columns of gate and of up."""
    expert, first, end, block_n = find_tile(
        tile_start_ptr,
        expert_start_ptr,
        tl.program_id(0),
        num_tiles_bound,
        tl.cdiv(WIDTH, BLOCK_N),
        num_experts,
        EXPERTS,
        BLOCK_M,
        GROUP_M,
    )
    if first >= end:
        return
    PADDED: tl.constexpr = WIDTH_GROUPS * BLOCK_K
    rows = first + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    is_row = rows < end
    # Rows outside the tile are some token's: what they give is not stored.
    tokens = (tl.load(row_slot_ptr + rows, mask=is_row, other=0) // SLOTS).to(tl.int64)
    x_ptrs = x_ptr + tokens[:, None] * (GROUPS * BLOCK_K) + inner[None, :]
    x_scale_ptrs = x_scale_ptr + tokens * GROUPS
    first_column = block_n * BLOCK_N
    gate_scale_ptr = weight_scale_ptr + (expert * 2 * WIDTH_GROUPS + first_column // BLOCK_K) * GROUPS
    up_scale_ptr = gate_scale_ptr + WIDTH_GROUPS * GROUPS
    weight_rows = expert * 2 * PADDED + first_column + tl.arange(0, BLOCK_N)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, GROUPS):
        x_scale = tl.load(x_scale_ptrs + group)
        gate_scale = tl.load(gate_scale_ptr + group)
        up_scale = tl.load(up_scale_ptr + group)
        x = tl.load(x_ptrs + group * BLOCK_K)
        if DESCRIPTOR and BLOCK_N < BLOCK_K:
            both = weight_ptr.load([expert.to(tl.int32), 0, first_column, group * BLOCK_K])
            joined = multiply_codes(x, both.reshape(2 * BLOCK_N, BLOCK_K).T)
            gate_part, up_part = column_halves(joined, BLOCK_M, 2 * BLOCK_N)
        elif DESCRIPTOR:
            gate_weight = load_block(weight_ptr, expert, first_column, group * BLOCK_K, BLOCK_N, BLOCK_K).T
            up_weight = load_block(weight_ptr, expert, first_column + PADDED, group * BLOCK_K, BLOCK_N, BLOCK_K).T
            gate_part, up_part = multiply_codes(x, gate_weight), multiply_codes(x, up_weight)
        else:
            weight_ptrs = weight_ptr + weight_rows[None, :] * (GROUPS * BLOCK_K) + group * BLOCK_K + inner[:, None]
            gate_part = multiply_codes(x, tl.load(weight_ptrs))
            up_part = multiply_codes(x, tl.load(weight_ptrs + PADDED * GROUPS * BLOCK_K))
        gate += gate_part * (x_scale * gate_scale)[:, None]
        up += up_part * (x_scale * up_scale)[:, None]
    columns = first_column + tl.arange(0, BLOCK_N)
    is_column = columns < WIDTH
    if bias_ptr is not None:
        bias_ptrs = bias_ptr + expert * 2 * WIDTH + columns
        gate += tl.load(bias_ptrs, mask=is_column, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_ptrs + WIDTH, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if RANK > 0:
        gate = add_low_rank(
            gate,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            columns,
            is_column,
            2 * WIDTH,
            True,
            RANK,
            BLOCK_R,
            tl.float32,
            PRECISION,
        )
        up = add_low_rank(
            up,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            columns + WIDTH,
            is_column,
            2 * WIDTH,
            True,
            RANK,
            BLOCK_R,
            tl.float32,
            PRECISION,
        )
    # Rounded whether kept or not: the forward pass gives the same bits with gradients and without.
    gate = narrow(gate, DTYPE)
    up = narrow(up, DTYPE)
    if KEEP:
        h_ptrs = preactivation_ptr + rows[:, None] * (2 * WIDTH) + columns[None, :]
        is_output = is_row[:, None] & is_column[None, :]
        tl.store(h_ptrs, gate, mask=is_output)
        tl.store(h_ptrs + WIDTH, up, mask=is_output)
    if BLOCK_N == BLOCK_K or activated_ptr is not None:
        activated = gated(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT, tl.float32)
        if activated_ptr is not None:
            activated_ptrs = activated_ptr + rows[:, None] * WIDTH + columns[None, :]
            tl.store(activated_ptrs, narrow(activated, DTYPE), mask=is_row[:, None] & is_column[None, :])
        if BLOCK_N == BLOCK_K:
            # Not `is_column`: see `bound`.
            activated = tl.where((columns < width)[None, :], activated, 0.0)
            store_group(codes_ptr, scales_ptr, rows, is_row, block_n, activated, WIDTH_GROUPS, BLOCK_K)
