"""Back through down projection and activation in FP8: what ``down_backward`` computes, of codes.

The first of the FP8 backward kernels. The output's gradient is in FP8 by token and gathered with its scales; the down
projection comes transposed. What follows the product is ``down_backward``'s own.

S rows, H hidden, I expert width, E experts, G_H and G_I their groups of 128.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.fp8 import GROUP
from deepseek_kernels.gpu.down_backward import store_tile
from deepseek_kernels.gpu.fp8_quantize import multiply_codes
from deepseek_kernels.gpu.low_rank_step import LowRankStep, add_low_rank, step_constants, step_operands
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_epilogue import backward_tile, epilogue_constants
from deepseek_kernels.gpu.triton_numerics import LAUNCH, TRITON_DTYPES
from deepseek_kernels.gpu.weight_blocks import load_block, weight_operand


def down_backward_fp8(
    grad_output: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    preactivation: Tensor,
    topk_weights: Tensor,
    metadata: RoutingMetadata,
    activation: str,
    tile: Tile,
    low_rank: LowRankStep | None = None,
    needs_scaled: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the pre-activation's gradient [S, 2I], the scaled activation [S, I] and the router weights' gradient.

    Args:
        grad_output: Codes [T, 128 G_H] and scales [T, G_H].
        weights: The down projection transposed: codes [E, 128 G_I, 128 G_H] and scales [E, G_I, G_H].
        preactivation: [S, 2I].
        topk_weights: [T, K].
        metadata: From `routing_metadata` with the tile's `block_m`.
        activation: Text of the epilogue.
        tile: Sizes of the tiles.
        low_rank: What an adapter adds to da; its factor is [E, r, I].
        needs_scaled: Whether the second result is wanted; it is None otherwise.

    Returns:
        The third is [S] by row, in fp32, undefined beyond the used rows.
    """
    (codes, scales), (matrices, weight_scales) = grad_output, weights
    num_rows, width, num_experts = preactivation.shape[0], preactivation.shape[1] // 2, matrices.shape[0]
    tile = backward_tile(tile, activation)
    blocks = triton.cdiv(width, tile.block_n)
    grad_h = torch.empty_like(preactivation)
    scaled = preactivation.new_empty(num_rows, width) if needs_scaled else None
    partial = preactivation.new_empty(blocks, num_rows, dtype=torch.float32)
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    operand = weight_operand(matrices, tile, tile.block_n, tile.block_k)
    if tiles:
        down_backward_fp8_kernel[(tiles * blocks,)](
            codes,
            scales,
            operand,
            weight_scales,
            preactivation,
            topk_weights,
            grad_h,
            scaled,
            partial,
            metadata.row_slot,
            metadata.expert_start,
            metadata.tile_start,
            tiles,
            num_rows,
            *(() if low_rank is None else step_operands(low_rank)),
            **down_backward_fp8_constants(
                preactivation.dtype,
                num_experts,
                scales.shape[1],
                width,
                topk_weights.shape[1],
                activation=activation,
                tile=tile,
                is_descriptor=isinstance(operand, TensorDescriptor),
                rank=0 if low_rank is None else low_rank.rank,
            ),
            **tile.launch_options,
            **LAUNCH,
        )
    return grad_h, scaled, partial.sum(0)


def down_backward_fp8_constants(
    dtype: torch.dtype,
    num_experts: int,
    groups: int,
    width: int,
    num_slots: int,
    *,
    activation: str,
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
        "DESCRIPTOR": is_descriptor,
        "DTYPE": TRITON_DTYPES[dtype],
        "PRECISION": matmul_precision(dtype),
        **tile.constants,
        **step_constants(rank),
    }


@triton.jit(do_not_specialize=["num_tiles_bound", "num_rows"])
def down_backward_fp8_kernel(
    grad_ptr,
    grad_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    preactivation_ptr,
    topk_weights_ptr,
    grad_h_ptr,
    scaled_ptr,
    partial_ptr,
    row_slot_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    num_rows,
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
    """One tile of `BLOCK_M` rows of one expert by `BLOCK_N` columns of the expert's width."""
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
    rows = first + tl.arange(0, BLOCK_M)
    inner = tl.arange(0, BLOCK_K)
    is_row = rows < end
    slots = tl.load(row_slot_ptr + rows, mask=is_row, other=0)
    tokens = (slots // SLOTS).to(tl.int64)
    grad_ptrs = grad_ptr + tokens[:, None] * (GROUPS * BLOCK_K) + inner[None, :]
    grad_scale_ptrs = grad_scale_ptr + tokens * GROUPS
    first_column = block_n * BLOCK_N
    weight_scale_ptr += (expert * WIDTH_GROUPS + first_column // BLOCK_K) * GROUPS
    weight_rows = expert * WIDTH_GROUPS * BLOCK_K + first_column + tl.arange(0, BLOCK_N)
    grad_a = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, GROUPS):
        scale = tl.load(grad_scale_ptrs + group) * tl.load(weight_scale_ptr + group)
        grad = tl.load(grad_ptrs + group * BLOCK_K)
        if DESCRIPTOR:
            weight = load_block(weight_ptr, expert, first_column, group * BLOCK_K, BLOCK_N, BLOCK_K).T
        else:
            weight_ptrs = weight_ptr + weight_rows[None, :] * (GROUPS * BLOCK_K) + inner[:, None]
            weight = tl.load(weight_ptrs + group * BLOCK_K)
        grad_a += multiply_codes(grad, weight) * scale[:, None]
    columns = first_column + tl.arange(0, BLOCK_N)
    if RANK > 0:
        grad_a = add_low_rank(
            grad_a,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            columns,
            columns < WIDTH,
            WIDTH,
            False,
            RANK,
            BLOCK_R,
            tl.float32,
            PRECISION,
        )
    row_weight = tl.load(topk_weights_ptr + slots, mask=is_row, other=0.0).to(tl.float32)
    # Offsets within the tile fit 32 bits; only the tile's own place needs 64.
    partial = store_tile(
        grad_a,
        row_weight,
        preactivation_ptr + first * 2 * WIDTH,
        grad_h_ptr + first * 2 * WIDTH,
        None if scaled_ptr is None else scaled_ptr + first * WIDTH,
        (end - first).to(tl.int32),
        first_column,
        WIDTH,
        ACTIVATION,
        LIMIT,
        ALPHA,
        SHIFT,
        False,
        DTYPE,
        tl.float32,
        BLOCK_M,
        BLOCK_N,
    )
    tl.store(partial_ptr + block_n.to(tl.int64) * num_rows + rows, partial, mask=is_row)
