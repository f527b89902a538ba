"""The thin products of low-rank adapters with rows: in the forward pass ``x A^T``, in the backward pass ``dout B``.

`low_rank_rows` multiplies every row by its expert's factor and leaves r numbers of it. It is bound by reading its
wide operand once; like the wide products it fetches rows by pointer where those lie by token, asks the host for
nothing and sums in a fixed order. A factor in another dtype than the rows is rounded to theirs as it is read.

T tokens, K slots per token, S = T*K rows, N the wide size, r rank, E experts.
"""

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.low_rank_step import rank_block
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, find_tile, max_tiles
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, multiply, narrow
from deepseek_kernels.gpu.weight_blocks import load_rows

MAX_RANK = 64  # Above, the wide operand is read again.
NUM_WARPS = 4


@functools.lru_cache(maxsize=256)
def rows_tile(down: Tile, rank: int) -> Tile:
    """Return the tile of `low_rank_rows`: the height of the wide products, whose map of tiles it shares.

    Args:
        down: The tile of the down projection.
        rank: The factor's r.
    """
    return replace(
        down, block_n=rank_block(rank, MAX_RANK), num_warps=NUM_WARPS, max_registers=0, uses_descriptor=False
    )


def low_rank_rows(
    values: Tensor,
    factor: Tensor,
    output: Tensor,
    metadata: RoutingMetadata,
    num_slots: int,
    tile: Tile,
    *,
    scaling: float,
    transpose: bool,
    is_by_token: bool,
) -> Tensor:
    """Return `output`, filled with ``scaling * values[r] @ factor[e]`` for every row r of expert e.

    Args:
        values: [S, N] by row, or [T, N] by token.
        factor: [E, N, r], or [E, r, N] with `transpose`; axes may be joined, as only its memory is read.
        output: [S, r].
        metadata: From `routing_metadata` with the tile's `block_m`.
        num_slots: K.
        tile: From `rows_tile`.
        scaling: Of the product.
        transpose: Whether the factor is stored rank first.
        is_by_token: Whether `values` lie by token.
    """
    (num_rows, rank), num_experts = output.shape, metadata.expert_start.shape[0] - 1
    tiles = max_tiles(num_rows, num_experts, tile.block_m)
    if tiles:
        launch(
            low_rank_rows_kernel,
            (tiles * ceil_div(rank, tile.block_n),),
            (values, factor, output, metadata.row_slot, metadata.expert_start, metadata.tile_start, tiles),
            low_rank_rows_constants,
            values.dtype,
            num_experts,
            values.shape[1],
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
        output = multiply(values, narrow(factor, DTYPE), output, ACC, PRECISION)
        value_ptrs += BLOCK_K
        factor_ptrs += BLOCK_K if TRANSPOSE else BLOCK_K * RANK
    output_ptrs = output_ptr + rows[:, None] * RANK + ranks[None, :]
    tl.store(output_ptrs, narrow(output * SCALING, DTYPE), mask=is_row[:, None] & is_rank[None, :])
