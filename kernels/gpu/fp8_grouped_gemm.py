"""Rows times their expert's matrix in FP8: the down projection, and the gradient of the rows of x.

Tensor cores of sm_90 read FP8 operands along the inner dimension only, so the weights come stored output first; the
backward pass has them transposed for it.

S rows, N columns of the result, K inner, E experts, G_N and G_K their groups of 128.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.gpu.fp8_quantize import multiply_codes
from deepseek_kernels.gpu.low_rank_step import LowRankStep, add_low_rank, step_constants, step_operands
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_numerics import LAUNCH, TRITON_DTYPES, narrow
from deepseek_kernels.gpu.weight_blocks import load_block, weight_operand


def grouped_gemm_fp8(
    rows: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    metadata: RoutingMetadata,
    columns: int,
    dtype: torch.dtype,
    tile: Tile,
    low_rank: LowRankStep | None = None,
    *,
    is_output_first: bool = True,
) -> Tensor:
    """Return ``rows[r] @ weights[e].T`` for every row r of expert e, [S, N] in `dtype`.

    Args:
        rows: Codes [S, 128 G_K], sorted by expert, and scales [S, G_K].
        weights: Codes [E, 128 G_N, 128 G_K] and scales [E, G_N, G_K].
        metadata: From `routing_metadata` with the tile's `block_m`.
        columns: N.
        dtype: Of the result.
        tile: Sizes of the tiles.
        low_rank: What an adapter adds to the result.
        is_output_first: Whether its factor is [E, N, r]; else [E, r, N].
    """
    (codes, scales), (matrices, weight_scales) = rows, weights
    num_rows, num_experts = codes.shape[0], matrices.shape[0]
    output = codes.new_empty(num_rows, columns, dtype=dtype)
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    if tiles:
        operands = [weight_operand(codes.unsqueeze(0), tile, tile.block_m, tile.block_k)]
        operands.append(weight_operand(matrices, tile, tile.block_n, tile.block_k))
        has_descriptors = all(isinstance(operand, TensorDescriptor) for operand in operands)
        grouped_gemm_fp8_kernel[(tiles * triton.cdiv(columns, tile.block_n),)](
            operands[0] if has_descriptors else codes,
            scales,
            operands[1] if has_descriptors else matrices,
            weight_scales,
            output,
            metadata.expert_start,
            metadata.tile_start,
            tiles,
            *(() if low_rank is None else step_operands(low_rank)),
            **grouped_gemm_fp8_constants(
                dtype,
                num_experts,
                columns,
                weight_scales.shape[1:],
                tile=tile,
                has_descriptors=has_descriptors,
                rank=0 if low_rank is None else low_rank.rank,
                is_output_first=is_output_first,
            ),
            **tile.launch_options,
            **LAUNCH,
        )
    return output


def grouped_gemm_fp8_constants(
    dtype: torch.dtype,
    num_experts: int,
    columns: int,
    groups: tuple[int, int],
    *,
    tile: Tile,
    has_descriptors: bool = False,
    rank: int = 0,
    is_output_first: bool = True,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks; `groups` are G_N and G_K."""
    return {
        "num_experts": num_experts,
        "COLUMNS": columns,
        "COLUMN_GROUPS": groups[0],
        "GROUPS": groups[1],
        "EXPERTS": triton.next_power_of_2(num_experts),
        "DESCRIPTORS": has_descriptors,
        "DTYPE": TRITON_DTYPES[dtype],
        "PRECISION": matmul_precision(dtype),
        "TRANSPOSE": is_output_first,
        **tile.constants,
        **step_constants(rank),
    }


@triton.jit(do_not_specialize=["num_tiles_bound"])
def grouped_gemm_fp8_kernel(
    rows_ptr,
    row_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    output_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    low_ptr,
    factor_ptr,
    num_experts: tl.constexpr,
    COLUMNS: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    GROUPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of `BLOCK_M` rows of one expert by `BLOCK_N` columns."""
    expert, first, end, block_n = find_tile(
        tile_start_ptr,
        expert_start_ptr,
        tl.program_id(0),
        num_tiles_bound,
        tl.cdiv(COLUMNS, BLOCK_N),
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
    inside = tl.minimum(rows, end - 1)  # Rows outside the tile are its last: what they give is not stored.
    row_ptrs = rows_ptr if DESCRIPTORS else rows_ptr + inside[:, None] * (GROUPS * BLOCK_K) + inner[None, :]
    row_scale_ptrs = row_scale_ptr + inside * GROUPS
    first_column = block_n * BLOCK_N
    weight_scale_ptr += (expert * COLUMN_GROUPS + first_column // BLOCK_K) * GROUPS
    columns = first_column + tl.arange(0, BLOCK_N)
    weight_rows = expert * COLUMN_GROUPS * BLOCK_K + columns
    output = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for group in range(0, GROUPS):
        scale = tl.load(row_scale_ptrs + group) * tl.load(weight_scale_ptr + group)
        if DESCRIPTORS:
            values = load_block(rows_ptr, expert * 0, first.to(tl.int32), group * BLOCK_K, BLOCK_M, BLOCK_K)
            weight = load_block(weight_ptr, expert, first_column, group * BLOCK_K, BLOCK_N, BLOCK_K).T
        else:
            values = tl.load(row_ptrs + group * BLOCK_K)
            weight_ptrs = weight_ptr + weight_rows[None, :] * (GROUPS * BLOCK_K) + inner[:, None]
            weight = tl.load(weight_ptrs + group * BLOCK_K)
        output += multiply_codes(values, weight) * scale[:, None]
    if RANK > 0:
        output = add_low_rank(
            output,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            columns,
            columns < COLUMNS,
            COLUMNS,
            TRANSPOSE,
            RANK,
            BLOCK_R,
            tl.float32,
            PRECISION,
        )
    output_ptrs = output_ptr + rows[:, None] * COLUMNS + columns[None, :]
    tl.store(output_ptrs, narrow(output, DTYPE), mask=is_row[:, None] & (columns < COLUMNS)[None, :])
