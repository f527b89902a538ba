"""Sums of each expert's rows: the gradient of a bias that every row of an expert was given.

One program sums one block of columns over all rows of one expert, in order, so repeat runs agree bit for bit.
An expert without rows gets zeros.

S rows, N columns, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata
from deepseek_kernels.gpu.triton_numerics import IS_INTERPRETED, TRITON_DTYPES, accumulator, narrow

BLOCK_ROWS, BLOCK_COLUMNS = (16, 16) if IS_INTERPRETED else (64, 64)


def row_sums(rows: Tensor, metadata: RoutingMetadata) -> Tensor:
    """Return [E, N]: for every expert the sum of its rows.

    Args:
        rows: [S, N], sorted by expert.
        metadata: From `routing_metadata`.
    """
    num_experts, columns = metadata.expert_start.numel() - 1, rows.shape[1]
    sums = rows.new_empty(num_experts, columns)
    grid = (ceil_div(columns, BLOCK_COLUMNS), num_experts)
    launch(row_sums_kernel, grid, (rows, sums, metadata.expert_start), row_sums_constants, rows.dtype, columns)
    return sums


def row_sums_constants(dtype: torch.dtype, columns: int) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "COLUMNS": columns,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "BLOCK_ROWS": BLOCK_ROWS,
        "BLOCK_COLUMNS": BLOCK_COLUMNS,
        "num_warps": 4,
    }


def row_sums_reference(rows: Tensor, row_expert: Tensor, num_experts: int) -> Tensor:
    """Return the same for rows of known expert.

    Args:
        rows: [R, N].
        row_expert: [R].
        num_experts: E.
    """
    return torch.stack([rows[row_expert == expert].sum(0) for expert in range(num_experts)])


@triton.jit
def row_sums_kernel(
    rows_ptr,
    sums_ptr,
    expert_start_ptr,
    COLUMNS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One block of columns of one expert."""
    expert = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    is_column = columns < COLUMNS
    start = tl.load(expert_start_ptr + expert).to(tl.int64)
    count = (tl.load(expert_start_ptr + expert + 1) - start).to(tl.int32)
    local = tl.arange(0, BLOCK_ROWS)
    row_ptrs = rows_ptr + (start + local)[:, None] * COLUMNS + columns[None, :]
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), dtype=ACC)
    for first in range(0, count, BLOCK_ROWS):
        mask = (local < count - first)[:, None] & is_column[None, :]
        total += tl.load(row_ptrs, mask=mask, other=0.0).to(ACC)
        row_ptrs += BLOCK_ROWS * COLUMNS
    tl.store(sums_ptr + expert * COLUMNS + columns, narrow(tl.sum(total, 0), DTYPE), mask=is_column)
