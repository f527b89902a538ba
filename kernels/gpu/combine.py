"""The sum over a token's rows: with router weights in the forward pass, without in the backward pass.

A gather by the token, not a scatter by the row: each output element is summed by one program in slot order, so repeat
runs agree bit for bit and nothing has to be zeroed first.

T tokens, K slots per token, S = T*K rows, H hidden.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.triton_numerics import LAUNCH, TRITON_DTYPES, accumulator, narrow

_MAX_BLOCK = 1024


def combine(rows: Tensor, slot_row: Tensor, num_slots: int, topk_weights: Tensor | None = None) -> Tensor:
    """Return ``out[t] = sum_k w[t, k] * rows[slot_row[t, k]]``, leaving unused slots out.

    Args:
        rows: [S, H].
        slot_row: Row of each slot, -1 if unused. [S] int32.
        num_slots: K.
        topk_weights: [T, K], or None for weights of one.
    """
    num_tokens, hidden = slot_row.numel() // num_slots, rows.shape[1]
    output = rows.new_empty(num_tokens, hidden)
    block = min(_MAX_BLOCK, triton.next_power_of_2(hidden))
    if num_tokens:
        combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
            rows,
            slot_row,
            rows if topk_weights is None else topk_weights,
            output,
            **combine_constants(rows.dtype, num_slots, hidden, block, has_weights=topk_weights is not None),
            **LAUNCH,
        )
    return output


def combine_constants(
    dtype: torch.dtype, num_slots: int, hidden: int, block: int, *, has_weights: bool
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "SLOTS": num_slots,
        "HIDDEN": hidden,
        "HAS_WEIGHTS": has_weights,
        "DTYPE": TRITON_DTYPES[dtype],
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


@triton.jit
def combine_kernel(
    rows_ptr,
    slot_row_ptr,
    weights_ptr,
    output_ptr,
    SLOTS: tl.constexpr,
    HIDDEN: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token by one block of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < HIDDEN
    total = tl.zeros((BLOCK,), dtype=ACC)
    for k in range(0, SLOTS):
        row = tl.load(slot_row_ptr + token * SLOTS + k).to(tl.int64)
        width = tl.where(row >= 0, HIDDEN, 0)
        values = tl.load(rows_ptr + row * HIDDEN + columns, mask=columns < width, other=0.0).to(ACC)
        if HAS_WEIGHTS:
            # An unused slot's weight may be anything, NaN included.
            weight = tl.load(weights_ptr + token * SLOTS + k).to(ACC)
            values *= tl.where(row >= 0, weight, 0.0)
        total += values
    tl.store(output_ptr + token * HIDDEN + columns, narrow(total, DTYPE), mask=is_column)
