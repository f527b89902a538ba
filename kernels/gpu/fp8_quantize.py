"""FP8 codes and their scales on a GPU: the same bits as ``fp8``'s, in a layout without edges.

Three kernels: rows in groups of 128, rows that are an expert's activation, computed from h on the way, and weights in
blocks of 128 x 128, as they are stored or transposed. What they write is padded with zeros to whole groups, so that
the kernels that multiply need no masks along the inner dimension and may take any operand by descriptor.

Surprising: the scale is found from the bits of the largest magnitude. Compared as integers, NaN is above infinity and
infinity above every number, so that neither is lost, as it would be to the hardware's maximum. And no size is known
when a kernel is compiled that says which columns are beyond the matrix: see `bound`.

R rows, C columns, G = ceil(C / 128) groups, E experts, I expert width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.fp8 import FP8, GROUP
from deepseek_kernels.gpu.triton_epilogue import epilogue_constants, gated
from deepseek_kernels.gpu.triton_numerics import INTERPRETED, IS_INTERPRETED, LAUNCH

_ROWS = 8 if IS_INTERPRETED else 32
# Of two bytes each, what one load takes, and its codes, what one store takes.
EVEN = 16


def quantize_rows(x: Tensor, used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return codes [R, 128 G], zeros beyond C, and scales [R, G].

    Args:
        x: [R, C], contiguous.
        used: How many rows are used, where only the device knows; the codes of the others are undefined. [1] int32.
    """
    rows, columns = x.shape
    groups = triton.cdiv(columns, GROUP)
    codes, scales = empty_codes(x, rows, groups)
    if rows:
        quantize_rows_kernel[(triton.cdiv(rows, _ROWS), groups)](
            x,
            codes,
            scales,
            used,
            rows,
            columns,
            groups,
            EVEN=columns % EVEN == 0,
            BLOCK_R=_ROWS,
            GROUP=GROUP,
            num_warps=4,
            **LAUNCH,
        )
    return codes, scales


def quantize_halves(x: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [R, 2 * 128 G] and scales [R, 2 G] of rows whose halves each begin a group.

    Args:
        x: [R, 2C], contiguous.
        used: How many rows are used. [1] int32.
    """
    rows, columns = x.shape
    codes, scales = quantize_rows(x.view(2 * rows, columns // 2), 2 * used)
    return codes.view(rows, 2 * codes.shape[1]), scales.view(rows, 2 * scales.shape[1])


def activate_rows(preactivation: Tensor, activation: str, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [R, 128 G] and scales [R, G] of the rows that the second product multiplies.

    Args:
        preactivation: [R, 2I], contiguous.
        activation: Text of the epilogue; not interleaved.
        used: How many rows are used. [1] int32.
    """
    rows, width = preactivation.shape[0], preactivation.shape[1] // 2
    groups = triton.cdiv(width, GROUP)
    codes, scales = empty_codes(preactivation, rows, groups)
    if rows:
        activate_rows_kernel[(triton.cdiv(rows, _ROWS), groups)](
            preactivation,
            codes,
            scales,
            used,
            width,
            **activate_rows_constants(width, activation),
            num_warps=4,
            **LAUNCH,
        )
    return codes, scales


def activate_rows_constants(width: int, activation: str) -> dict[str, Any]:
    """The kernel's compile-time arguments, for launches and for compile-only checks."""
    constants = epilogue_constants(activation)
    del constants["INTERLEAVED"]
    sizes = {"WIDTH": width, "GROUPS": triton.cdiv(width, GROUP), "EVEN": width % EVEN == 0}
    return {**sizes, "BLOCK_R": _ROWS, "GROUP": GROUP, **constants}


def quantize_blocks(weights: Tensor, *, parts: int = 1, transpose: bool = False) -> tuple[Tensor, Tensor]:
    """Return codes and scales of every expert's matrix, or of its transpose, with whole blocks of 128 x 128.

    Args:
        weights: [E, P * R, C], contiguous.
        parts: P: into how many parts the rows are cut, each of which begins a block: 2 for gates and ups.
        transpose: Whether to return the transposes.

    Returns:
        Codes [E, P * 128 G_R, 128 G_C] and scales [E, P * G_R, G_C]; of the transposes [E, 128 G_C, P * 128 G_R]
        and [E, G_C, P * G_R].
    """
    num_experts, rows, columns = weights.shape[0], weights.shape[1] // parts, weights.shape[2]
    row_groups, groups = triton.cdiv(rows, GROUP), triton.cdiv(columns, GROUP)
    shape = (groups, parts * row_groups) if transpose else (parts * row_groups, groups)
    codes = weights.new_empty(num_experts, shape[0] * GROUP, shape[1] * GROUP, dtype=FP8)
    scales = weights.new_empty(num_experts, *shape, dtype=torch.float32)
    quantize_blocks_kernel[(row_groups * groups * num_experts * parts,)](
        weights,
        codes,
        scales,
        rows,
        columns,
        row_groups,
        groups,
        PARTS=parts,
        TRANSPOSE=transpose,
        EVEN=columns % EVEN == 0,
        GROUP=GROUP,
        num_warps=8,
        **LAUNCH,
    )
    return codes, scales


def empty_codes(x: Tensor, rows: int, groups: int) -> tuple[Tensor, Tensor]:
    """Return codes [R, 128 G] and scales [R, G] that are still to be written.

    Args:
        x: Any tensor on the right device.
        rows: R.
        groups: G.
    """
    return x.new_empty(rows, groups * GROUP, dtype=FP8), x.new_empty(rows, groups, dtype=torch.float32)


@triton.jit
def bound(size, EVEN: tl.constexpr):
    """`size`, an argument that is not specialized, as the bound of a mask; `EVEN` says that 16 divides it.

    Were it known when the kernel is compiled, so would the zeros beyond it be, and ptxas 12.8 (of Triton 3.6) leaves
    half a register unwritten where one pair of constant codes goes to several places: the codes beyond I were bytes of
    an address, NaN among them.
    """
    return size // 16 * 16 if EVEN else size


@triton.jit
def scale_bits(magnitudes):
    """Bits of the least power of two that brings these magnitudes to 448 or below, and of its reciprocal.

    Args:
        magnitudes: Bits of the largest magnitude of each group, as int32.
    """
    # The scales stop at 2^-108: see ``fp8``, whose least magnitude this is, 2^-100.
    bits = tl.maximum(magnitudes, 27 << 23)
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    # Infinity and NaN have all bits of the exponent set; NaN is what they become.
    is_number = bits < 0x7F800000
    scale = tl.where(is_number, exponent << 23, 0x7FC00000)
    reciprocal = tl.where(is_number, (254 - exponent) << 23, 0x7FC00000)
    return scale, reciprocal


@triton.jit
def to_code(x):
    """The E4M3 code nearest to each of `x`, ties to even; of magnitudes up to 448 and NaN."""
    if INTERPRETED:
        # Triton's interpreter loses the carry of the mantissa: rounded by integers there.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        bits = bits & 0x7FFFFFFF
        magnitude = bits.to(tl.float32, bitcast=True)
        # Adding 2^14 leaves multiples of 2^-9, which is what the codes below 2^-6 are.
        small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
        code = tl.where(bits < 0x3C800000, small, large)
        code = tl.where(bits > 0x7F800000, 0x7F, code) | sign
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return x.to(tl.float8e4nv)


@triton.jit
def quantize_tile(x):
    """Codes of a tile whose rows are one group each, and a scale per row."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale, reciprocal = scale_bits(tl.max(bits, 1))
    codes = to_code(x * reciprocal.to(tl.float32, bitcast=True)[:, None])
    return codes, scale.to(tl.float32, bitcast=True)


@triton.jit
def store_group(codes_ptr, scales_ptr, rows, is_row, group, x, GROUPS, GROUP: tl.constexpr):
    """Write one group of some rows, given its numbers in fp32, with zeros where the row has no column."""
    codes, scales = quantize_tile(x)
    places = group * GROUP + tl.arange(0, GROUP)
    tl.store(codes_ptr + rows[:, None] * (GROUPS * GROUP) + places[None, :], codes, mask=is_row[:, None])
    tl.store(scales_ptr + rows * GROUPS + group, scales, mask=is_row)


@triton.jit(do_not_specialize=["num_rows", "columns"])
def quantize_rows_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    used_ptr,
    num_rows,
    columns,
    groups,
    EVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One group of `BLOCK_R` rows."""
    columns = bound(columns, EVEN)
    if used_ptr is not None:
        num_rows = tl.load(used_ptr)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    if tl.program_id(0) * BLOCK_R >= num_rows:
        return
    is_row = rows < num_rows
    places = group * GROUP + tl.arange(0, GROUP)
    mask = is_row[:, None] & (places < columns)[None, :]
    x = tl.load(x_ptr + rows[:, None] * columns + places[None, :], mask=mask, other=0.0).to(tl.float32)
    store_group(codes_ptr, scales_ptr, rows, is_row, group, x, groups, GROUP)


@triton.jit(do_not_specialize=["width"])
def activate_rows_kernel(
    h_ptr,
    codes_ptr,
    scales_ptr,
    used_ptr,
    width,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One group of `BLOCK_R` rows."""
    num_rows = tl.load(used_ptr)
    if tl.program_id(0) * BLOCK_R >= num_rows:
        return
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    group = tl.program_id(1)
    is_row = rows < num_rows
    columns = group * GROUP + tl.arange(0, GROUP)
    mask = is_row[:, None] & (columns < bound(width, EVEN))[None, :]
    h_ptrs = h_ptr + rows[:, None] * (2 * WIDTH) + columns[None, :]
    gate = tl.load(h_ptrs, mask=mask, other=0.0)
    up = tl.load(h_ptrs + WIDTH, mask=mask, other=0.0)
    activated = gated(gate, up, ACTIVATION, LIMIT, ALPHA, SHIFT, tl.float32)
    store_group(codes_ptr, scales_ptr, rows, is_row, group, tl.where(mask, activated, 0.0), GROUPS, GROUP)


@triton.jit(do_not_specialize=["rows", "columns"])
def quantize_blocks_kernel(
    weights_ptr,
    codes_ptr,
    scales_ptr,
    rows,
    columns,
    row_groups,
    groups,
    PARTS: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One block of one part of one expert's matrix."""
    columns = bound(columns, EVEN)
    block = tl.program_id(0) % (row_groups * groups)
    part = (tl.program_id(0) // (row_groups * groups)).to(tl.int64)
    row_group, group = block // groups, block % groups
    inner = tl.arange(0, GROUP)
    ms, ns = row_group * GROUP + inner, group * GROUP + inner
    mask = (ms < rows)[:, None] & (ns < columns)[None, :]
    ptrs = weights_ptr + part * rows * columns + ms[:, None].to(tl.int64) * columns + ns[None, :]
    weights = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    bits = weights.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale, reciprocal = scale_bits(tl.max(tl.max(bits, 1), 0))
    codes = to_code(weights * reciprocal.to(tl.float32, bitcast=True))
    scale = scale.to(tl.float32, bitcast=True)
    if TRANSPOSE:
        # Parts of an expert lie side by side: row `ns` of the transpose, column `ms` of this part.
        expert, column_group = part // PARTS, (part % PARTS) * row_groups + row_group
        place = (expert * groups + group) * (PARTS * row_groups) + column_group
        first = expert * groups * GROUP + group * GROUP
        out_ptrs = codes_ptr + (first + inner)[:, None] * (PARTS * row_groups * GROUP)
        tl.store(out_ptrs + (column_group * GROUP + inner)[None, :], tl.trans(codes))
    else:
        place = (part * row_groups + row_group) * groups + group
        first = (part * row_groups + row_group) * GROUP
        tl.store(codes_ptr + (first + inner)[:, None] * (groups * GROUP) + ns[None, :], codes)
    tl.store(scales_ptr + place, scale)


@triton.jit
def multiply_codes(left, right):
    """The product of two tiles of codes, in fp32; 128 columns of them, then their scales are due."""
    if INTERPRETED:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), input_precision="ieee")
    return tl.dot(left, right)
