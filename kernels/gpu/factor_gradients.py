"""The gradients of a layer's low-rank factors by one kernel: ``dout^T (x A^T)`` for B, ``(dout B)^T x`` for A.

Up to four sums over the rows of every expert, each of a wide operand times a thin one of r numbers per row:

    gradient        wide                       thin
    B of down       grad_output, by token      scaling * a A^T, times the router weight here
    A of down       activated rows, scaled     through
    B of gate_up    grad_h                     scaling * x A^T
    A of gate_up    hidden_states, by token    through

Each is bound by reading its wide operand once. Programs of all experts take one block of columns after another, so
rows that several experts share are still in the cache. Sums run in a fixed order.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, r rank, E experts.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.low_rank import MAX_RANK, NUM_WARPS
from deepseek_kernels.gpu.low_rank_step import rank_block
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata
from deepseek_kernels.gpu.tiles import Tile, matmul_precision
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, multiply, narrow

_MAX_WIDE = 128


class Product(NamedTuple):
    """One sum over rows; a gradient that nobody wants is None, and so may its operands be.

    Attributes:
        wide: [S, N], or [T, N] by token.
        thin: [S, r].
        gradient: Contiguous: [E, N, r] for B, [E, r, N] for A; axes may be joined.
    """

    wide: Tensor | None = None
    thin: Tensor | None = None
    gradient: Tensor | None = None


NO_PRODUCT = Product()


@functools.lru_cache(maxsize=256)
def gradient_tile(weight_gradient: Tile, rank: int) -> Tile:
    """Return the tile of `factor_gradients`; `block_k` counts rows.

    Args:
        weight_gradient: The tile of the weights' gradients.
        rank: The larger r.
    """
    wide = min(weight_gradient.block_m, _MAX_WIDE)
    return replace(weight_gradient, block_m=wide, block_n=rank_block(rank, MAX_RANK), num_warps=NUM_WARPS)


def factor_gradients(
    products: tuple[Product, Product, Product, Product],
    topk_weights: Tensor,
    metadata: RoutingMetadata,
    weight_gradient: Tile,
) -> None:
    """Fill the gradients that are there: B and A of the down projection, B and A of the first one.

    Args:
        products: In this order; the first and the last have their wide operand by token.
        topk_weights: [T, K], by which the thin operand of the first is multiplied.
        metadata: From `routing_metadata`.
        weight_gradient: The tile of the weights' gradients.
    """
    operands: list[Tensor | None] = []
    sizes: list[int] = []
    for wide, thin, gradient in products:
        if wide is None or thin is None or gradient is None:
            operands += NO_PRODUCT
            sizes += (0, 0)
        else:
            operands += (wide, thin, gradient)
            sizes += (wide.shape[1], thin.shape[1])
            dtype = wide.dtype
    rank = max(sizes[1::2])
    if not rank:
        return
    tile, blocks = gradient_tile(weight_gradient, rank), 0
    for i in (0, 2, 4, 6):
        blocks += ceil_div(sizes[i], tile.block_m) * ceil_div(sizes[i + 1], tile.block_n)
    gradients = operands[2::3]
    launch(
        factor_gradients_kernel,
        (metadata.expert_start.shape[0] - 1, blocks),
        (*operands, topk_weights, metadata.row_slot, metadata.expert_start),
        factor_gradients_constants,
        dtype,
        tuple([None if one is None else one.dtype for one in gradients]),
        tuple(sizes),
        topk_weights.shape[1],
        tile=tile,
        precision=matmul_precision(dtype),
    )


def factor_gradients_constants(
    dtype: torch.dtype,
    gradient_dtypes: tuple[torch.dtype | None, ...],
    sizes: tuple[int, ...],
    num_slots: int,
    *,
    tile: Tile,
    precision: str | None = None,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    names = ("B_DOWN", "A_DOWN", "B_GATE_UP", "A_GATE_UP")
    constants: dict[str, Any] = {}
    for name, gradient_dtype, wide, rank in zip(names, gradient_dtypes, sizes[::2], sizes[1::2], strict=True):
        constants |= {f"{name}_WIDE": wide, f"{name}_RANK": rank}
        constants[f"{name}_DTYPE"] = None if gradient_dtype is None else TRITON_DTYPES[gradient_dtype]
    return {
        **constants,
        "SLOTS": num_slots,
        "DTYPE": TRITON_DTYPES[dtype],
        "ACC": accumulator(dtype),
        "PRECISION": precision or matmul_precision(dtype),
        **tile.constants,
    }


@triton.jit
def factor_gradients_kernel(
    b_down_wide_ptr,
    b_down_thin_ptr,
    b_down_ptr,
    a_down_wide_ptr,
    a_down_thin_ptr,
    a_down_ptr,
    b_gate_up_wide_ptr,
    b_gate_up_thin_ptr,
    b_gate_up_ptr,
    a_gate_up_wide_ptr,
    a_gate_up_thin_ptr,
    a_gate_up_ptr,
    topk_weights_ptr,
    row_slot_ptr,
    expert_start_ptr,
    B_DOWN_WIDE: tl.constexpr,
    B_DOWN_RANK: tl.constexpr,
    B_DOWN_DTYPE: tl.constexpr,
    A_DOWN_WIDE: tl.constexpr,
    A_DOWN_RANK: tl.constexpr,
    A_DOWN_DTYPE: tl.constexpr,
    B_GATE_UP_WIDE: tl.constexpr,
    B_GATE_UP_RANK: tl.constexpr,
    B_GATE_UP_DTYPE: tl.constexpr,
    A_GATE_UP_WIDE: tl.constexpr,
    A_GATE_UP_RANK: tl.constexpr,
    A_GATE_UP_DTYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """`BLOCK_M` of a wide size by `BLOCK_N` of the rank, for one expert and one of the gradients."""
    block = tl.program_id(1)
    block = _gradient_block(
        block, b_down_wide_ptr, b_down_thin_ptr, b_down_ptr, topk_weights_ptr, row_slot_ptr, expert_start_ptr,
        B_DOWN_WIDE, B_DOWN_RANK, B_DOWN_DTYPE, SLOTS, True, True, DTYPE, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    block = _gradient_block(
        block, a_down_wide_ptr, a_down_thin_ptr, a_down_ptr, None, row_slot_ptr, expert_start_ptr,
        A_DOWN_WIDE, A_DOWN_RANK, A_DOWN_DTYPE, SLOTS, False, False, DTYPE, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    block = _gradient_block(
        block, b_gate_up_wide_ptr, b_gate_up_thin_ptr, b_gate_up_ptr, None, row_slot_ptr, expert_start_ptr,
        B_GATE_UP_WIDE, B_GATE_UP_RANK, B_GATE_UP_DTYPE, SLOTS, True, False, DTYPE, ACC, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    _gradient_block(
        block, a_gate_up_wide_ptr, a_gate_up_thin_ptr, a_gate_up_ptr, None, row_slot_ptr, expert_start_ptr,
        A_GATE_UP_WIDE, A_GATE_UP_RANK, A_GATE_UP_DTYPE, SLOTS, False, True, DTYPE, ACC, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _gradient_block(
    block,
    wide_ptr,
    thin_ptr,
    gradient_ptr,
    topk_weights_ptr,
    row_slot_ptr,
    expert_start_ptr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    IS_B: tl.constexpr,
    GATHER: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the block if it is of this gradient, and return its number among those of the others."""
    blocks: tl.constexpr = tl.cdiv(WIDE, BLOCK_M) * tl.cdiv(RANK, BLOCK_N)
    if gradient_ptr is not None:  # noqa: SIM102 - known at compile time, and the other is not
        if (block >= 0) & (block < blocks):
            _sum_rows(
                block,
                wide_ptr,
                thin_ptr,
                gradient_ptr,
                topk_weights_ptr,
                row_slot_ptr,
                expert_start_ptr,
                WIDE,
                RANK,
                OUT_DTYPE,
                SLOTS,
                IS_B,
                GATHER,
                DTYPE,
                ACC,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
            )
    return block - blocks


@triton.jit
def _sum_rows(
    block,
    wide_ptr,
    thin_ptr,
    gradient_ptr,
    topk_weights_ptr,
    row_slot_ptr,
    expert_start_ptr,
    WIDE: tl.constexpr,
    RANK: tl.constexpr,
    OUT_DTYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    IS_B: tl.constexpr,
    GATHER: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    expert = tl.program_id(0).to(tl.int64)
    blocks_n: tl.constexpr = tl.cdiv(RANK, BLOCK_N)
    ms = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
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
    gradient_ptr += expert * WIDE * RANK
    if IS_B:
        gradient_ptrs = gradient_ptr + ms[:, None].to(tl.int64) * RANK + ranks[None, :]
    else:
        gradient_ptrs = gradient_ptr + ranks[None, :].to(tl.int64) * WIDE + ms[:, None]
    tl.store(gradient_ptrs, narrow(total, OUT_DTYPE), mask=is_m[:, None] & is_rank[None, :])
