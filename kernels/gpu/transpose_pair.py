"""Two matrices transposed by one kernel: the factors B of an adapter, and their gradients.

PEFT keeps B as [M, r * E] with the expert running fastest. Read or written like that, every element of an expert would
cost a sector of its own. The kernels want [E, M, r], which as matrices of E and of M * r is a transpose.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.gpu.launch import ceil_div, launch
from deepseek_kernels.gpu.triton_numerics import TRITON_DTYPES, narrow

_BLOCK = 64


def transpose_pair(
    sources: tuple[Tensor | None, Tensor | None],
    targets: tuple[Tensor | None, Tensor | None],
    num_experts: int,
    *,
    is_by_expert: bool,
) -> None:
    """Fill each target with its source's elements in the other order, rounded to the target's dtype.

    Args:
        sources: Contiguous, [M * r, E]; or [E, M * r] with `is_by_expert`. Either may be missing, and both.
        targets: Contiguous, of the other order; missing where the source is.
        num_experts: E.
        is_by_expert: Whether the sources lie expert by expert.
    """
    first, second = targets
    size = 0 if first is None else first.numel() // num_experts
    other = 0 if second is None else second.numel() // num_experts
    if size == other == 0:
        return
    launch(
        transpose_pair_kernel,
        (ceil_div(num_experts, _BLOCK) * (ceil_div(size, _BLOCK) + ceil_div(other, _BLOCK)),),
        (*sources, *targets),
        transpose_pair_constants,
        size,
        other,
        num_experts,
        is_by_expert,
        None if first is None else first.dtype,
        None if second is None else second.dtype,
    )


def transpose_pair_constants(
    size: int,
    other: int,
    num_experts: int,
    is_by_expert: bool,
    dtype: torch.dtype | None,
    other_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    return {
        "SIZE": size,
        "OTHER_SIZE": other,
        "EXPERTS": num_experts,
        "BY_EXPERT": is_by_expert,
        "DTYPE": None if dtype is None else TRITON_DTYPES[dtype],
        "OTHER_DTYPE": None if other_dtype is None else TRITON_DTYPES[other_dtype],
        "BLOCK": _BLOCK,
    }


@triton.jit
def transpose_pair_kernel(
    source_ptr,
    other_source_ptr,
    target_ptr,
    other_target_ptr,
    SIZE: tl.constexpr,
    OTHER_SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    DTYPE: tl.constexpr,
    OTHER_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one of the two."""
    block = tl.program_id(0)
    blocks: tl.constexpr = tl.cdiv(SIZE, BLOCK) * tl.cdiv(EXPERTS, BLOCK)
    # One condition is known at compile time, the other is not.
    if source_ptr is not None:  # noqa: SIM102
        if block < blocks:
            _transpose_block(source_ptr, target_ptr, block, SIZE, EXPERTS, BY_EXPERT, DTYPE, BLOCK)
    if other_source_ptr is not None:  # noqa: SIM102
        if block >= blocks:
            _transpose_block(
                other_source_ptr, other_target_ptr, block - blocks, OTHER_SIZE, EXPERTS, BY_EXPERT, OTHER_DTYPE, BLOCK
            )


@triton.jit
def _transpose_block(
    source_ptr,
    target_ptr,
    block,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,
    BY_EXPERT: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Neighboring programs share places and take other experts."""
    blocks: tl.constexpr = tl.cdiv(EXPERTS, BLOCK)
    places = (block // blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    experts = (block % blocks * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    is_place, is_expert = places < SIZE, experts < EXPERTS
    # Each side is read or written along its contiguous axis, the last one.
    expert_last = places[:, None] * EXPERTS + experts[None, :]
    expert_first = experts[:, None] * SIZE + places[None, :]
    mask_last, mask_first = is_place[:, None] & is_expert[None, :], is_expert[:, None] & is_place[None, :]
    if BY_EXPERT:
        values = tl.load(source_ptr + expert_first, mask=mask_first, other=0.0)
        tl.store(target_ptr + expert_last, narrow(tl.trans(values), DTYPE), mask=mask_last)
    else:
        values = tl.load(source_ptr + expert_last, mask=mask_last, other=0.0)
        tl.store(target_ptr + expert_first, narrow(tl.trans(values), DTYPE), mask=mask_first)
