"""Gradients of the experts' matrices: per expert, ``left^T @ right`` over its rows.

Used twice: for the down projection left is the gathered gradient of the output, for the up projections right is the
gathered input. The number of rows is known to the device only, so the loop over rows has a bound loaded
from memory; an expert without rows runs it zero times and writes zeros, and no tensor is zeroed beforehand.

R rows of one expert, M x N its matrix, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, multiply, narrow


def weight_gradient(
    left: Tensor, right: Tensor, metadata: RoutingMetadata, num_slots: int, tile: Tile, *, gather: str
) -> Tensor:
    """Return [E, M, N]: for every expert the product of its rows of `left`, transposed, with those of `right`.

    Args:
        left: [S, M] by row, or [T, M] by token if it is the gathered one.
        right: [S, N] by row, or [T, N] by token if it is the gathered one.
        metadata: From `routing_metadata`.
        num_slots: K.
        tile: Sizes of the tiles; `block_k` counts rows here.
        gather: ``left`` or ``right``: which of the two is stored by token.
    """
    num_experts = metadata.expert_start.numel() - 1
    gradient = left.new_empty(num_experts, left.shape[1], right.shape[1])
    tiles = ceil_div(left.shape[1], tile.block_m) * ceil_div(right.shape[1], tile.block_n)
    launch(
        weight_gradient_kernel,
        (tiles, num_experts),
        (left, right, gradient, metadata.row_slot, metadata.expert_start),
        weight_gradient_constants,
        left.dtype,
        left.shape[1],
        right.shape[1],
        num_slots,
        gather=gather,
        tile=tile,
        precision=matmul_precision(left.dtype),
    )
    return gradient


def weight_gradient_constants(
    dtype: torch.dtype,
    height: int,
    width: int,
    num_slots: int,
    *,
    gather: str,
    tile: Tile,
    precision: str | None = None,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "M": height,
        "N": width,
        "SLOTS": num_slots,
        "GATHER_LEFT": gather == "left",
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "PRECISION": precision or matmul_precision(dtype),
        **tile.constants,
    }


def weight_gradient_reference(left: Tensor, right: Tensor, row_expert: Tensor, num_experts: int) -> Tensor:
    """Return the same for rows of known expert, both operands by row.

    Args:
        left: [R, M].
        right: [R, N].
        row_expert: [R].
        num_experts: E.
    """
    return torch.stack([left[row_expert == e].T @ right[row_expert == e] for e in range(num_experts)])


@triton.jit
def weight_gradient_kernel(
    left_ptr,
    right_ptr,
    gradient_ptr,
    row_slot_ptr,
    expert_start_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    SLOTS: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One `BLOCK_M` x `BLOCK_N` tile of one expert's matrix; all tiles of an expert are neighbors in the grid."""
    expert = tl.program_id(1).to(tl.int64)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    block_m, block_n = tl.swizzle2d(tile // blocks_n, tile % blocks_n, blocks_m, blocks_n, GROUP_M)
    ms = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    is_m, is_n = ms < M, ns < N
    start = tl.load(expert_start_ptr + expert).to(tl.int64)
    end = tl.load(expert_start_ptr + expert + 1).to(tl.int64)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC)
    # Columns outside the matrix are some other columns: what they give is not stored. Rows outside the expert are its
    # last row, times zeros of the gathered operand, which alone is masked.
    left_columns = tl.max_contiguous(tl.multiple_of(ms % M, 8), 8) if M % 8 == 0 else ms % M
    right_columns = tl.max_contiguous(tl.multiple_of(ns % N, 8), 8) if N % 8 == 0 else ns % N
    left_ptr += left_columns[:, None]
    right_ptr += right_columns[None, :]
    count = (end - start).to(tl.int32)
    row_slot_ptr += start
    if GATHER_LEFT:
        right_ptr += start * N
    else:
        left_ptr += start * M
    for first in range(0, count, BLOCK_K):
        rows = first + inner
        is_row = rows < count
        inside = tl.minimum(rows, count - 1)
        tokens = tl.load(row_slot_ptr + inside) // SLOTS
        if GATHER_LEFT:
            left = tl.load(left_ptr + tokens.to(tl.int64)[None, :] * M, mask=is_row[None, :], other=0.0)
            right = tl.load(right_ptr + inside.to(tl.int64)[:, None] * N)
        else:
            left = tl.load(left_ptr + inside.to(tl.int64)[None, :] * M)
            right = tl.load(right_ptr + tokens.to(tl.int64)[:, None] * N, mask=is_row[:, None], other=0.0)
        total = multiply(left, right, total, ACC, PRECISION)
    gradient_ptrs = gradient_ptr + expert * M * N + ms[:, None].to(tl.int64) * N + ns[None, :]
    tl.store(gradient_ptrs, narrow(total, DTYPE), mask=is_m[:, None] & is_n[None, :])
