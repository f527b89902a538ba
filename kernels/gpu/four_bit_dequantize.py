"""A dense copy of a stack in 4 bits, for as long as one kernel needs it: where rows are many, and under adapters.

The values are bit for bit those of `PackedMatrices`. ``experts.py`` makes the copy right before the product that reads
it and lets go of it right after, so that at most one projection of one layer is dense at a time: 2 * E * 2I * H bytes
in bf16. Experts without rows are left out; nobody reads their part of the copy.

E experts, M outputs, N inputs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.four_bit import PackedMatrices
from deepseek_kernels.gpu.four_bit_codes import value_table, words_of
from deepseek_kernels.gpu.launch import launch
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, narrow

BLOCK = 1024


def dense(weights: Tensor | PackedMatrices, expert_start: Tensor | None = None) -> Tensor:
    """Return a stack as a tensor: itself, or a copy of what is in 4 bits, in the type it is to be read in.

    Args:
        weights: [E, M, N].
        expert_start: First row of each expert, then their end, [E + 1] int32; the matrices of experts without rows are
            then not written.
    """
    if isinstance(weights, Tensor):
        return weights
    output = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    words = words_of(weights)
    launch(
        dequantize_kernel,
        (triton.cdiv(words.shape[1], BLOCK), words.shape[0]),
        (words, weights.scales, value_table(weights.device), expert_start, output),
        dequantize_constants,
        weights.dtype,
        words.shape[1],
        weights.format.name,
        weights.format.group_size,
    )
    return output


def dequantize_constants(dtype: torch.dtype, num_words: int, form: str, group_size: int) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "WORDS": num_words,
        "NF4": form == "nf4",
        "GROUP": group_size,
        "DTYPE": TRITON_DTYPES[dtype],
        "BLOCK": BLOCK,
        "num_warps": 4,
    }


@triton.jit
def dequantize_kernel(
    words_ptr,
    scales_ptr,
    table_ptr,
    expert_start_ptr,
    output_ptr,
    WORDS: tl.constexpr,
    NF4: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`BLOCK` words of one expert: both formats lie flat, and a group is a whole number of words."""
    expert = tl.program_id(1).to(tl.int64)
    if expert_start_ptr is not None:
        num_rows = tl.load(expert_start_ptr + expert + 1) - tl.load(expert_start_ptr + expert)
        if num_rows == 0:
            return
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_word = words < WORDS
    places = tl.arange(0, 8)
    if NF4:  # the earlier of two in the high half of its byte
        places = places ^ 1
    packed = tl.load(words_ptr + expert * WORDS + words, mask=is_word, other=0)
    scales = tl.load(scales_ptr + expert * (8 * WORDS // GROUP) + 8 * words // GROUP, mask=is_word, other=0.0)
    codes = (packed[:, None] >> 4 * places[None, :]) & 15
    values = tl.load(table_ptr + codes) if NF4 else (codes - 8).to(tl.float32)
    values = narrow(values * scales.to(tl.float32)[:, None], DTYPE)
    pointers = output_ptr + expert * 8 * WORDS + 8 * words[:, None] + tl.arange(0, 8)[None, :]
    tl.store(pointers, values, mask=is_word[:, None])
