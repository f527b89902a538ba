"""One more step of a tiled product: what a low-rank adapter adds to the accumulator before it is rounded.

``rows @ W + low @ factor`` with r numbers per row in `low`: the step is as long as r, where those of the main loop add
up to hundreds or thousands. Without an adapter (``RANK`` 0) nothing of this is compiled. ``adapters.py`` makes the
operands.

S rows, r rank, E experts.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.triton_numerics import multiply, narrow

# A tensor core multiplies 16 elements at least. Beside accumulators that fill the registers there is room for 32.
_LEAST, _MOST = 16, 32


class LowRankStep(NamedTuple):
    """The operands of the step.

    Attributes:
        rows: Of every row, scaling included. [S, r].
        factor: Stored like the weights of the product, with r as the inner size: [E, r, N] or [E, N, r]; axes may be
            joined, and it may have another dtype than the rows, to which it is rounded as it is read.
    """

    rows: Tensor
    factor: Tensor

    @property
    def rank(self) -> int:
        """The inner size r."""
        return self.rows.shape[1]


def rank_block(rank: int, most: int = _MOST) -> int:
    """Return how many elements of the rank a program takes at once.

    Args:
        rank: The inner size r.
        most: A power of two.
    """
    return min(most, max(_LEAST, triton.next_power_of_2(rank)))


def step_constants(rank: int) -> dict[str, Any]:
    """Return the compile-time arguments of the step; without a rank its pointers are among them.

    Args:
        rank: The inner size r; 0 for no step.
    """
    pointers = {} if rank else {"low_ptr": None, "factor_ptr": None}
    return {"RANK": rank, "BLOCK_R": rank_block(rank), **pointers}


def step_operands(step: LowRankStep | None) -> tuple[Tensor | None, Tensor | None]:
    """Return the step's pointers for a launch.

    Args:
        step: None for no step.
    """
    return (None, None) if step is None else (step.rows, step.factor)


@triton.jit
def add_low_rank(
    total,
    low_ptr,
    factor_ptr,
    expert,
    first,
    is_row,
    columns,
    is_column,
    COLUMNS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`total` and the product of the rows of `low` from `first` on with these columns of the expert's factor."""
    # Places within a tile and within a factor fit 32 bits; only where they begin needs 64.
    low_ptr += first * RANK
    factor_ptr += expert * COLUMNS * RANK
    rows = tl.arange(0, total.shape[0])
    for start in tl.static_range(0, RANK, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        is_rank = ranks < RANK
        low_ptrs = low_ptr + rows[:, None] * RANK + ranks[None, :]
        low = tl.load(low_ptrs, mask=is_row[:, None] & is_rank[None, :], other=0.0)
        if TRANSPOSE:
            factor_ptrs = factor_ptr + columns[None, :] * RANK + ranks[:, None]
        else:
            factor_ptrs = factor_ptr + ranks[:, None] * COLUMNS + columns[None, :]
        factor = tl.load(factor_ptrs, mask=is_rank[:, None] & is_column[None, :], other=0.0)
        total = multiply(low, narrow(factor, low.dtype), total, ACC, PRECISION)
    return total
