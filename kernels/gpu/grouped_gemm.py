"""Rows times their expert's matrix: the down projection and, in the backward pass, the gradient of the rows of x.

Rows are sorted by expert and lie one after another, so nothing is gathered. One kernel serves both, for
``a W_down^T`` and ``dh W_gate_up`` differ only in the strides of the weight. Where a token has one expert, its row is
its result: `grouped_gemm_by_slot` writes it in the token's place, and there is nothing left to combine.

S rows, N columns of the result, K inner, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from deepseek_kernels.gpu.combine import fill_unused
from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.low_rank_step import LowRankStep, add_low_rank, step_constants, step_operands
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, multiply, narrow
from deepseek_kernels.gpu.weight_blocks import load_block, weight_operand


def grouped_gemm(
    rows: Tensor,
    weights: Tensor,
    metadata: RoutingMetadata,
    tile: Tile,
    *,
    transpose: bool,
    low_rank: LowRankStep | None = None,
) -> Tensor:
    """Return ``rows[r] @ weights[e]`` for every row r of expert e.

    Args:
        rows: [S, K], sorted by expert.
        weights: [E, K, N], or [E, N, K] with `transpose`.
        metadata: From `routing_metadata` with the tile's `block_m`.
        tile: Sizes of the tiles.
        transpose: Whether the weights are stored output first.
        low_rank: What an adapter adds to the result; its factor is stored like the weights.
    """
    output = rows.new_empty(rows.shape[0], weights.shape[1 if transpose else 2])
    _launch(rows, weights, output, metadata, (None, None), tile, transpose, low_rank)
    return output


def grouped_gemm_by_slot(
    rows: Tensor,
    weights: Tensor,
    metadata: RoutingMetadata,
    tile: Tile,
    topk_weights: Tensor | None,
    *,
    transpose: bool,
    low_rank: LowRankStep | None = None,
) -> Tensor:
    """Return ``w[t] * rows[slot_row[t]] @ weights[e]`` for every token t, zero where its one slot is unused.

    Args:
        rows: [S, K], sorted by expert.
        weights: [E, K, N], or [E, N, K] with `transpose`.
        metadata: Of one slot per token, from `routing_metadata` with the tile's `block_m`.
        tile: Sizes of the tiles.
        topk_weights: [T, 1], or None for weights of one.
        transpose: Whether the weights are stored output first.
        low_rank: As in `grouped_gemm`.
    """
    output = rows.new_empty(metadata.slot_row.numel(), weights.shape[1 if transpose else 2])
    _launch(rows, weights, output, metadata, (metadata.row_slot, topk_weights), tile, transpose, low_rank)
    fill_unused(output, metadata.slot_row)
    return output


def _launch(
    rows: Tensor,
    weights: Tensor,
    output: Tensor,
    metadata: RoutingMetadata,
    places: tuple[Tensor | None, Tensor | None],
    tile: Tile,
    transpose: bool,
    low_rank: LowRankStep | None,
) -> None:
    """Fill `output`, row by row or in the places of the slots."""
    num_rows, inner = rows.shape
    num_experts, columns = weights.shape[0], output.shape[1]
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    if tiles:
        block = (tile.block_n, tile.block_k) if transpose else (tile.block_k, tile.block_n)
        operands = [weight_operand(rows.unsqueeze(0), tile, tile.block_m, tile.block_k)]
        operands.append(weight_operand(weights, tile, *block))
        has_descriptors = all(isinstance(operand, TensorDescriptor) for operand in operands)
        operands = operands if has_descriptors else [rows, weights]
        launch(
            grouped_gemm_kernel,
            (tiles * ceil_div(columns, tile.block_n),),
            (*operands, output, metadata.expert_start, metadata.tile_start, tiles, *step_operands(low_rank), *places),
            grouped_gemm_constants,
            rows.dtype,
            num_experts,
            columns,
            inner,
            transpose=transpose,
            tile=tile,
            has_descriptors=has_descriptors,
            rank=0 if low_rank is None else low_rank.rank,
            precision=matmul_precision(rows.dtype),
        )


def grouped_gemm_constants(
    dtype: torch.dtype,
    num_experts: int,
    columns: int,
    inner: int,
    *,
    transpose: bool,
    tile: Tile,
    has_descriptors: bool = False,
    rank: int = 0,
    precision: str | None = None,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks of results by row."""
    return {
        "row_slot_ptr": None,
        "slot_weight_ptr": None,
        "num_experts": num_experts,
        "COLUMNS": columns,
        "INNER": inner,
        "EXPERTS": triton.next_power_of_2(num_experts),
        "TRANSPOSE": transpose,
        "DESCRIPTORS": has_descriptors,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "PRECISION": precision or matmul_precision(dtype),
        **tile.constants,
        **step_constants(rank),
    }


def grouped_gemm_reference(rows: Tensor, weights: Tensor, row_expert: Tensor, *, transpose: bool) -> Tensor:
    """Return the same, row by row, for rows of known expert.

    Args:
        rows: [S, K].
        weights: [E, K, N], or [E, N, K] with `transpose`.
        row_expert: Expert of each row.
        transpose: Whether the weights are stored output first.
    """
    matrices = (weights.transpose(1, 2) if transpose else weights)[row_expert]
    return (rows.unsqueeze(1) @ matrices).squeeze(1)


@triton.jit(do_not_specialize=["num_tiles_bound"])
def grouped_gemm_kernel(
    rows_ptr,
    weight_ptr,
    output_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    low_ptr,
    factor_ptr,
    row_slot_ptr,
    slot_weight_ptr,
    num_experts: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
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
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    is_row, is_column = rows < end, columns < COLUMNS
    output = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    if DESCRIPTORS:
        for k in range(0, INNER, BLOCK_K):
            values = load_block(rows_ptr, expert * 0, first.to(tl.int32), k, BLOCK_M, BLOCK_K)
            if TRANSPOSE:
                weight = load_block(weight_ptr, expert, block_n * BLOCK_N, k, BLOCK_N, BLOCK_K).T
            else:
                weight = load_block(weight_ptr, expert, k, block_n * BLOCK_N, BLOCK_K, BLOCK_N)
            output = multiply(values, weight, output, ACC, PRECISION)
    else:
        row_ptrs = rows_ptr + rows[:, None] * INNER + inner[None, :]
        weight_ptrs = weight_ptr + expert * COLUMNS * INNER
        if TRANSPOSE:
            weight_ptrs += columns[None, :].to(tl.int64) * INNER + inner[:, None]
        else:
            weight_ptrs += inner[:, None].to(tl.int64) * COLUMNS + columns[None, :]
        for k in range(0, INNER, BLOCK_K):
            is_inner = inner < INNER - k
            values = tl.load(row_ptrs, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            weight = tl.load(weight_ptrs, mask=is_inner[:, None] & is_column[None, :], other=0.0)
            output = multiply(values, weight, output, ACC, PRECISION)
            row_ptrs += BLOCK_K
            weight_ptrs += BLOCK_K if TRANSPOSE else BLOCK_K * COLUMNS
    if RANK > 0:
        output = add_low_rank(
            output,
            low_ptr,
            factor_ptr,
            expert,
            first,
            is_row,
            columns,
            is_column,
            COLUMNS,
            TRANSPOSE,
            RANK,
            BLOCK_R,
            ACC,
            PRECISION,
        )
    places = rows
    if row_slot_ptr is not None:
        places = tl.load(row_slot_ptr + rows, mask=is_row, other=0).to(tl.int64)
        if slot_weight_ptr is not None:
            output *= tl.load(slot_weight_ptr + places, mask=is_row, other=0.0).to(ACC)[:, None]
    output_ptrs = output_ptr + places[:, None] * COLUMNS + columns[None, :]
    tl.store(output_ptrs, narrow(output, DTYPE), mask=is_row[:, None] & is_column[None, :])
