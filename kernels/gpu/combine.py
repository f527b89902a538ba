"""The sum over a token's rows: with router weights in the forward pass, without in the backward pass.

In the backward pass the same programs bring the router weights' gradient from rows into the order of the slots.

A gather by the token, not a scatter by the row: each output element is summed by one program in slot order, so repeat
runs agree bit for bit and nothing has to be zeroed first. A slot for which there was no row (-2 in `slot_row`, see
`SlotOrder`) makes its token's result NaN, so that it cannot be taken for one.

T tokens, K slots per token, S = T*K rows, H hidden.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, accumulator, narrow

_MAX_BLOCK = 1024
# Looked at by one program of `fill_unused`: nearly all have nothing to do.
_TOKENS = 64


def combine(rows: Tensor, slot_row: Tensor, num_slots: int, topk_weights: Tensor | None = None) -> Tensor:
    """Return ``out[t] = sum_k w[t, k] * rows[slot_row[t, k]]``, leaving unused slots out.

    Args:
        rows: [R, H].
        slot_row: Row of each slot, -1 if unused. [S] int32.
        num_slots: K.
        topk_weights: [T, K], or None for weights of one.
    """
    num_tokens, hidden = slot_row.numel() // num_slots, rows.shape[1]
    output = rows.new_empty(num_tokens, hidden)
    block = _block(hidden)
    if num_tokens:
        launch(
            combine_kernel,
            (num_tokens, ceil_div(hidden, block)),
            (rows, slot_row, topk_weights, output, None, None, slot_row.numel()),
            combine_constants,
            rows.dtype,
            num_slots,
            hidden,
            block,
            is_limited=rows.shape[0] < slot_row.numel(),
        )
    return output


def combine_gradients(
    rows: Tensor | None, slot_row: Tensor, topk_weights: Tensor, partial: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden states [T, H] and of router weights [T, K]; each None where its source is.

    Args:
        rows: Gradient of the input by row. [R, H].
        slot_row: Row of each slot, -1 if unused. [S] int32.
        topk_weights: [T, K].
        partial: Third result of ``down_backward``: the router weights' gradient by row, in parts. [P, R].
    """
    num_tokens, num_slots = topk_weights.shape
    hidden = 1 if rows is None else rows.shape[1]
    grad_x = None if rows is None else rows.new_empty(num_tokens, hidden)
    grad_weights = None if partial is None else torch.empty_like(topk_weights)
    source = partial if rows is None else rows
    if num_tokens and source is not None:
        block, num_rows = _block(hidden), source.shape[0] if partial is None else partial.shape[1]
        launch(
            combine_kernel,
            (num_tokens, ceil_div(hidden, block)),
            (rows, slot_row, None, grad_x, partial, grad_weights, num_rows),
            combine_constants,
            source.dtype,
            num_slots,
            hidden,
            block,
            is_limited=num_rows < slot_row.numel(),
            parts=0 if partial is None else partial.shape[0],
            weights_dtype=topk_weights.dtype,
        )
    return grad_x, grad_weights


def fill_unused(output: Tensor, slot_row: Tensor) -> None:
    """Write zeros into the rows of `output` whose slot is unused, NaN where its row is missing, of one slot per token.

    Args:
        output: [T, H]; changed.
        slot_row: Row of each slot, -1 if unused, -2 if missing. [T] int32.
    """
    num_tokens, hidden = output.shape
    if num_tokens:
        block = _block(hidden)
        operands = (output, slot_row, num_tokens)
        launch(fill_unused_kernel, (ceil_div(num_tokens, _TOKENS),), operands, fill_constants, hidden, block)


def fill_constants(hidden: int, block: int) -> dict[str, Any]:
    """The compile-time arguments of `fill_unused_kernel`, for launches and for compile-only checks."""
    return {"HIDDEN": hidden, "BLOCK": block, "TOKENS": _TOKENS, "num_warps": 4}


@functools.cache
def _block(hidden: int) -> int:
    return min(_MAX_BLOCK, triton.next_power_of_2(hidden))


def combine_constants(
    dtype: torch.dtype,
    num_slots: int,
    hidden: int,
    block: int,
    *,
    is_limited: bool = False,
    parts: int = 0,
    weights_dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "SLOTS": num_slots,
        "ALL_SLOTS": triton.next_power_of_2(num_slots),
        "PARTS": parts,
        "LIMITED": is_limited,
        "HIDDEN": hidden,
        "DTYPE": TRITON_DTYPES[dtype],
        "WEIGHTS_DTYPE": TRITON_DTYPES[weights_dtype],
        "ACC": accumulator(dtype),
        "BLOCK": block,
        "num_warps": 4,
    }


def combine_reference(rows: Tensor, slot_row: Tensor, num_slots: int, topk_weights: Tensor | None = None) -> Tensor:
    """Return the same in plain torch.

    Args:
        rows: [S, H].
        slot_row: [S].
        num_slots: K.
        topk_weights: [T, K] or None.
    """
    slot_row = slot_row.long()
    gathered = torch.where(slot_row.unsqueeze(1) >= 0, rows[slot_row.clamp(min=0)], 0)
    if topk_weights is not None:
        gathered = gathered * topk_weights.reshape(-1, 1)
    return gathered.view(-1, num_slots, rows.shape[1]).sum(1)


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    rows_ptr,
    slot_row_ptr,
    weights_ptr,
    output_ptr,
    partial_ptr,
    grad_weights_ptr,
    num_rows,
    SLOTS: tl.constexpr,
    ALL_SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    LIMITED: tl.constexpr,
    HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
    WEIGHTS_DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token by one block of columns."""
    token = tl.program_id(0).to(tl.int64)
    if partial_ptr is not None:
        slots = tl.arange(0, ALL_SLOTS)
        mine = slots < tl.where(tl.program_id(1) == 0, SLOTS, 0)
        row_of_slot = tl.load(slot_row_ptr + token * SLOTS + slots, mask=mine, other=-1)
        sums = _sum_parts(partial_ptr + row_of_slot, row_of_slot >= 0, num_rows, PARTS, ALL_SLOTS, ACC)
        if LIMITED:
            sums = tl.where(row_of_slot == -2, float("nan"), sums)
        tl.store(grad_weights_ptr + token * SLOTS + slots, narrow(sums, WEIGHTS_DTYPE), mask=mine)
    if rows_ptr is not None:
        columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        is_column = columns < HIDDEN
        total = tl.zeros((BLOCK,), dtype=ACC)
        for k in range(0, SLOTS):
            row = tl.load(slot_row_ptr + token * SLOTS + k).to(tl.int64)
            width = tl.where(row >= 0, HIDDEN, 0)
            values = tl.load(rows_ptr + row * HIDDEN + columns, mask=columns < width, other=0.0).to(ACC)
            if weights_ptr is not None:
                # An unused slot's weight may be anything, NaN included.
                weight = tl.load(weights_ptr + token * SLOTS + k).to(ACC)
                values *= tl.where(row >= 0, weight, 0.0)
            if LIMITED:
                values = tl.where(row == -2, float("nan"), values)
            total += values
        tl.store(output_ptr + token * HIDDEN + columns, narrow(total, DTYPE), mask=is_column)


@triton.jit(do_not_specialize=["num_tokens"])
def fill_unused_kernel(
    output_ptr, slot_row_ptr, num_tokens, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr
):
    """`TOKENS` tokens."""
    first = tl.program_id(0).to(tl.int64) * TOKENS
    tokens = first + tl.arange(0, TOKENS)
    rows = tl.load(slot_row_ptr + tokens, mask=tokens < num_tokens, other=0)
    if tl.min(rows, 0) >= 0:
        return
    columns = tl.arange(0, BLOCK)
    for token in range(first, min(first + TOKENS, num_tokens)):
        row = tl.load(slot_row_ptr + token)
        width = tl.where(row < 0, HIDDEN, 0)
        values = tl.where(row + columns * 0 == -2, float("nan"), 0.0).to(output_ptr.dtype.element_ty)
        for start in range(0, HIDDEN, BLOCK):
            pointers = output_ptr + token * HIDDEN + start + columns
            tl.store(pointers, values, mask=start + columns < width)


@triton.jit
def _sum_parts(pointers, mask, stride, PARTS: tl.constexpr, SIZE: tl.constexpr, ACC: tl.constexpr):
    """The sum of `PARTS` numbers `stride` apart, in the order of torch's ``sum(0)`` on a GPU: by four, then across."""
    a = tl.zeros((SIZE,), dtype=ACC)
    b = tl.zeros((SIZE,), dtype=ACC)
    c = tl.zeros((SIZE,), dtype=ACC)
    d = tl.zeros((SIZE,), dtype=ACC)
    stride = stride.to(tl.int64)
    REST: tl.constexpr = PARTS % 4
    for _ in range(0, PARTS // 4):
        a += tl.load(pointers, mask=mask, other=0.0)
        b += tl.load(pointers + stride, mask=mask, other=0.0)
        c += tl.load(pointers + 2 * stride, mask=mask, other=0.0)
        d += tl.load(pointers + 3 * stride, mask=mask, other=0.0)
        pointers += 4 * stride
    if REST > 0:
        a += tl.load(pointers, mask=mask, other=0.0)
    if REST > 1:
        b += tl.load(pointers + stride, mask=mask, other=0.0)
    if REST > 2:
        c += tl.load(pointers + 2 * stride, mask=mask, other=0.0)
    return a + b + c + d
