"""The thin products of low-rank adapters: rows into the rank, and the gradients of the two factors.

`low_rank_rows` multiplies every row by its expert's factor and leaves r numbers of it: in the forward pass ``x A^T``,
in the backward pass ``dout B``. `factor_gradient` sums over an expert's rows: ``dout^T (x A^T)`` for B and
``(dout B)^T x`` for A. Both are bound by reading their wide operand once; like the wide products they fetch rows by
pointer where those lie by token, ask the host for nothing and sum in a fixed order.

T tokens, K slots per token, S = T*K rows, N the wide size, r rank, E experts.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import launch
from deepseek_kernels.gpu.low_rank_step import rank_block
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, Tiles, matmul_precision
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, multiply, narrow
from deepseek_kernels.gpu.weight_blocks import load_rows

_MAX_WIDE = 128
_MAX_RANK = 64  # Above, the wide operand is read again.
_NUM_WARPS = 4


def rows_tile(tiles: Tiles, rank: int) -> Tile:
    """Return the tile of `low_rank_rows`: the height of the wide products, whose map of tiles it shares.

    Args:
        tiles: Of the call.
        rank: The factor's r.
    """
    return replace(
        tiles.down, block_n=rank_block(rank, _MAX_RANK), num_warps=_NUM_WARPS, max_registers=0, uses_descriptor=False
    )


def gradient_tile(tiles: Tiles, rank: int) -> Tile:
    """Return the tile of `factor_gradient`; `block_k` counts rows.

    Args:
        tiles: Of the call.
        rank: The factor's r.
    """
    wide = min(tiles.weight_gradient.block_m, _MAX_WIDE)
    return replace(tiles.weight_gradient, block_m=wide, block_n=rank_block(rank, _MAX_RANK), num_warps=_NUM_WARPS)


def low_rank_rows(
    values: Tensor,
    factor: Tensor,
    metadata: RoutingMetadata,
    num_slots: int,
    tile: Tile,
    *,
    scaling: float,
    transpose: bool,
    is_by_token: bool,
    out: Tensor | None = None,
) -> Tensor:
    """Return ``scaling * values[r] @ factor[e]`` [S, r] for every row r of expert e.

    Args:
        values: [S, N] by row, or [T, N] by token.
        factor: [E, N, r], or [E, r, N] with `transpose`.
        metadata: From `routing_metadata` with the tile's `block_m`.
        num_slots: K.
        tile: From `rows_tile`.
        scaling: Of the product.
        transpose: Whether the factor is stored rank first.
        is_by_token: Whether `values` lie by token.
        out: [S, r], where to put it.
    """
    num_rows, (num_experts, *sides) = metadata.row_slot.numel(), factor.shape
    inner, rank = reversed(sides) if transpose else sides
    output = values.new_empty(num_rows, rank) if out is None else out
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    if tiles:
        launch(
            low_rank_rows_kernel,
            (tiles * triton.cdiv(rank, tile.block_n),),
            (values, factor, output, metadata.row_slot, metadata.expert_start, metadata.tile_start, tiles),
            low_rank_rows_constants,
            values.dtype,
            num_experts,
            inner,
            rank,
            num_slots,
            scaling=scaling,
            transpose=transpose,
            is_by_token=is_by_token,
            tile=tile,
            precision=matmul_precision(values.dtype),
        )
    return output


def low_rank_rows_constants(
    dtype: torch.dtype,
    num_experts: int,
    inner: int,
    rank: int,
    num_slots: int,
    *,
    scaling: float,
    transpose: bool,
    is_by_token: bool,
    tile: Tile,
    precision: str | None = None,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "num_experts": num_experts,
        "INNER": inner,
        "RANK": rank,
        "SLOTS": num_slots,
        "EXPERTS": triton.next_power_of_2(num_experts),
        "SCALING": scaling,
        "TRANSPOSE": transpose,
        "GATHER": is_by_token,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "PRECISION": precision or matmul_precision(dtype),
        **tile.constants,
    }


def factor_gradient(
    wide: Tensor,
    thin: Tensor,
    metadata: RoutingMetadata,
    num_slots: int,
    tile: Tile,
    *,
    factor: Tensor,
    is_b: bool,
    is_by_token: bool,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Return the gradient of one factor, in its shape, order and dtype: per expert the sum over rows of wide x thin.

    Args:
        wide: [S, N] by row, or [T, N] by token.
        thin: [S, r] by row.
        metadata: From `routing_metadata`.
        num_slots: K.
        tile: From `gradient_tile`.
        factor: As PEFT stores it: A is [E * r, N], B is [N, r * E] with the expert running fastest.
        is_b: Whether it is B.
        is_by_token: Whether `wide` lies by token.
        row_weights: [T, K], by which the rows of `thin` are multiplied.
    """
    num_experts, gradient = metadata.expert_start.numel() - 1, factor.new_empty(factor.shape)
    blocks = triton.cdiv(wide.shape[1], tile.block_m) * triton.cdiv(thin.shape[1], tile.block_n)
    launch(
        factor_gradient_kernel,
        (num_experts, blocks),
        (wide, thin, row_weights, gradient, metadata.row_slot, metadata.expert_start),
        factor_gradient_constants,
        wide.dtype,
        factor.dtype,
        num_experts,
        wide.shape[1],
        thin.shape[1],
        num_slots,
        is_b=is_b,
        is_by_token=is_by_token,
        tile=tile,
        precision=matmul_precision(wide.dtype),
    )
    return gradient


def factor_gradient_constants(
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    num_experts: int,
    wide: int,
    rank: int,
    num_slots: int,
    *,
    is_b: bool,
    is_by_token: bool,
    tile: Tile,
    precision: str | None = None,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "WIDE": wide,
        "RANK": rank,
        "SLOTS": num_slots,
        # How far apart neighbors along each axis lie in the gradient.
        "EXPERT_STRIDE": 1 if is_b else rank * wide,
        "WIDE_STRIDE": rank * num_experts if is_b else 1,
        "RANK_STRIDE": num_experts if is_b else wide,
        "GATHER": is_by_token,
        "DTYPE": TRITON_DTYPES[dtype],
        "OUT_DTYPE": TRITON_DTYPES[factor_dtype],
        "ACC": accumulator(dtype),
        "PRECISION": precision or matmul_precision(dtype),
        **tile.constants,
    }


@triton.jit(do_not_specialize=["num_tiles_bound"])
def low_rank_rows_kernel(
    values_ptr,
    factor_ptr,
    output_ptr,
    row_slot_ptr,
    expert_start_ptr,
    tile_start_ptr,
    num_tiles_bound,
    num_experts: tl.constexpr,
    INNER: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SCALING: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    GATHER: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of `BLOCK_M` rows of one expert by `BLOCK_N` elements of the rank."""
    expert, first, end, block_n = find_tile(
        tile_start_ptr,
        expert_start_ptr,
        tl.program_id(0),
        num_tiles_bound,
        tl.cdiv(RANK, BLOCK_N),
        num_experts,
        EXPERTS,
        BLOCK_M,
        GROUP_M,
    )
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    ranks = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    is_row, is_rank = rows < end, ranks < RANK
    # Rows beyond the tile's last are that one again; they are not stored.
    sources = tl.minimum(rows, end - 1)
    if GATHER:
        sources = (tl.load(row_slot_ptr + sources) // SLOTS).to(tl.int64)
    value_ptrs = values_ptr + sources[:, None] * INNER + inner[None, :]
    factor_ptrs = factor_ptr + expert * INNER * RANK
    if TRANSPOSE:
        factor_ptrs += ranks[None, :].to(tl.int64) * INNER + inner[:, None]
    else:
        factor_ptrs += inner[:, None].to(tl.int64) * RANK + ranks[None, :]
    output = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for k in range(0, INNER, BLOCK_K):
        is_inner = inner < INNER - k
        values = load_rows(value_ptrs, is_inner, INNER % BLOCK_K == 0)
        factor = tl.load(factor_ptrs, mask=is_inner[:, None] & is_rank[None, :], other=0.0)
        output = multiply(values, factor, output, ACC, PRECISION)
        value_ptrs += BLOCK_K
        factor_ptrs += BLOCK_K if TRANSPOSE else BLOCK_K * RANK
    output_ptrs = output_ptr + rows[:, None] * RANK + ranks[None, :]
    tl.store(output_ptrs, narrow(output * SCALING, DTYPE), mask=is_row[:, None] & is_rank[None, :])


@triton.jit
def factor_gradient_kernel(
    wide_ptr,
    thin_ptr,
    topk_weights_ptr,
    gradient_ptr,
    row_slot_ptr,
    expert_start_ptr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERT_STRIDE: tl.constexpr,
    WIDE_STRIDE: tl.constexpr,
    RANK_STRIDE: tl.constexpr,
    GATHER: tl.constexpr,
    DTYPE: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`BLOCK_M` of the wide size by `BLOCK_N` of the rank, for one expert.

    Experts are neighbors in the grid, as they are in the gradient of B.
    """
    expert = tl.program_id(0).to(tl.int64)
    blocks_n = tl.cdiv(RANK, BLOCK_N)
    ms = tl.program_id(1) // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tl.program_id(1) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    is_m, is_rank = ms < WIDE, ranks < RANK
    start = tl.load(expert_start_ptr + expert).to(tl.int64)
    count = (tl.load(expert_start_ptr + expert + 1) - start).to(tl.int32)
    # Columns outside the matrix are some other columns, whose results are not stored; rows outside the expert are its
    # last row, times zeros of the thin operand.
    wide_columns = tl.max_contiguous(tl.multiple_of(ms % WIDE, 8), 8) if WIDE % 8 == 0 else ms % WIDE
    wide_ptr += wide_columns[:, None]
    thin_ptr += start * RANK + ranks[None, :]
    row_slot_ptr += start
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    for first in range(0, count, BLOCK_K):
        rows = first + inner
        is_row = rows < count
        inside = tl.minimum(rows, count - 1)
        sources = (tl.load(row_slot_ptr + inside) // SLOTS).to(tl.int64) if GATHER else start + inside
        wide = tl.load(wide_ptr + sources[None, :] * WIDE)
        thin = tl.load(
            thin_ptr + inside.to(tl.int64)[:, None] * RANK, mask=is_row[:, None] & is_rank[None, :], other=0.0
        )
        if topk_weights_ptr is not None:
            weights = tl.load(topk_weights_ptr + tl.load(row_slot_ptr + inside)).to(ACC)
            thin = narrow(thin.to(ACC) * weights[:, None], DTYPE)
        total = multiply(wide, thin, total, ACC, PRECISION)
    gradient_ptr += expert * EXPERT_STRIDE
    gradient_ptrs = gradient_ptr + ms[:, None].to(tl.int64) * WIDE_STRIDE + ranks[None, :].to(tl.int64) * RANK_STRIDE
    tl.store(gradient_ptrs, narrow(total, OUT_DTYPE), mask=is_m[:, None] & is_rank[None, :])
