"""4-bit codes inside Triton kernels: `PackedMatrices` as the kernels take it, and how a tile of it is expanded.

Both formats are read as words of eight codes along the input. A code's value times its group's scale is rounded once,
as `PackedMatrices` does, so that every kernel computes with the very weights that it gives.

A tile's inner axis is in another order than the weights'. Shifting a word right gives one code of each
word, so the tile holds the first code of all words, then the second of all, and `by_place` puts the other operand's
columns in that order: a product does not depend on it, and no code has to change its thread. With PTX that handles two
codes in one register, the inner loop for 16 rows compiles for sm_90 to 3 instructions per int4 weight, from 11
(docs/experiments.md).

E experts, M outputs, N inputs.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from deepseek_kernels.four_bit import NF4, PackedMatrices
from deepseek_kernels.gpu.triton_numerics import IS_INTERPRETED, narrow

# The PTX finds a value by setting bits in the table's address.
_TABLE_ALIGNMENT = 64
# Exponents in which the last four bits of the fraction count ones: what is left is to take `_OFFSET` off.
_BF16_128, _FP16_1024 = 0x43004300, 0x64006400


def words_of(packed: PackedMatrices) -> Tensor:
    """Return the codes as words, a view.

    Args:
        packed: A stack [E, M, N].

    Returns:
        [E, M * N / 8] int32.
    """
    flat = packed.codes.flatten(1)
    return flat if flat.dtype == torch.int32 else flat.view(torch.int32)


@functools.lru_cache(maxsize=64)
def value_table(device: torch.device) -> Tensor:
    """Return the 16 values of NF4, in fp32, on a device; made once, for making it waits for the device.

    Args:
        device: Where.
    """
    table = torch.tensor(NF4, dtype=torch.float32, device=device)
    assert device.type != "cuda" or table.data_ptr() % _TABLE_ALIGNMENT == 0
    return table


def fits_products(packed: PackedMatrices, dtype: torch.dtype) -> bool:
    """Return whether kernels can multiply by the codes themselves; else they take a dense copy.

    No group may span two rows, a tile's inner length has to be a multiple of the group or a part of it, and tensor
    cores have to take the activations.

    Args:
        packed: A stack [E, M, N].
        dtype: Of the activations.
    """
    group = packed.format.group_size
    return dtype.itemsize == 2 and packed.shape[2] % group == 0 and group & (group - 1) == 0


def code_constants(form: str, group_size: int) -> dict[str, Any]:
    """Return the compile-time arguments that say how a stack is stored.

    Args:
        form: ``nf4`` or ``int4``.
        group_size: Weights that share a scale.
    """
    return {"NF4": form == "nf4", "GROUP": group_size, "PTX": has_ptx()}


def has_ptx() -> bool:
    """Return whether kernels are compiled for NVIDIA GPUs."""
    return not IS_INTERPRETED and torch.version.hip is None


def _int4_assembly(ones: int) -> str:
    """Two words in; eight registers out, of the same code of both words, as 16-bit floats with this exponent."""
    lines = ["prmt.b32 low, $8, $9, 0x5410;", "prmt.b32 high, $8, $9, 0x7632;"]
    for place in range(8):
        half, shift = ("low", "high")[place // 4], 4 * (place % 4)
        lines.append(f"shr.u32 code, {half}, {shift};")
        lines.append(f"lop3.b32 ${place}, code, 0x000F000F, {ones:#x}, 0xEA;")
    return "{ .reg .b32 low, high, code; " + " ".join(lines) + " }"


def _nf4_assembly() -> str:
    """One word and the table's address in; the eight values out."""
    lines = ["mov.b64 {low, high}, $9;"]
    for place in range(8):
        shift = 4 * (place ^ 1) - 2  # to the code, times the four bytes of a value
        move = f"shr.u32 code, $8, {shift};" if shift > 0 else f"shl.b32 code, $8, {-shift};"
        lines += [move, "lop3.b32 code, code, 0x3C, low, 0xEA;", "mov.b64 address, {code, high};"]
        lines.append(f"ld.global.nc.f32 ${place}, [address];")
    return "{ .reg .b32 low, high, code; .reg .b64 address; " + " ".join(lines) + " }"


_INT4_BF16 = tl.constexpr(_int4_assembly(_BF16_128))
_INT4_FP16 = tl.constexpr(_int4_assembly(_FP16_1024))
_NF4_FP32 = tl.constexpr(_nf4_assembly())
_EIGHT_OF_TWO = tl.constexpr(",".join(["=r"] * 8 + ["r", "r"]))
_EIGHT_OF_ONE = tl.constexpr(",".join(["=f"] * 8 + ["r", "l"]))


@triton.jit
def by_place(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The columns of a tile in the order of `load_weights`: by place within a word, then by word."""
    return values.reshape(ROWS, COLUMNS // 8, 8).permute(0, 2, 1).reshape(ROWS, COLUMNS)


@triton.jit
def load_weights(
    words_ptr,
    scales_ptr,
    table_ptr,
    rows,
    is_row,
    k,
    INNER: tl.constexpr,
    NF4: tl.constexpr,
    GROUP: tl.constexpr,
    PTX: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Columns `k` to ``k + BLOCK_K`` of these rows (of all experts' rows), [BLOCK_K, BLOCK_N], inner axis by place.

    What lies beyond the end of a row is zero.
    """
    WORDS: tl.constexpr = BLOCK_K // 8
    GROUPS: tl.constexpr = BLOCK_K // GROUP if BLOCK_K > GROUP else 1
    places = k // 8 + tl.arange(0, WORDS)
    groups = k // GROUP + tl.arange(0, GROUPS)
    words = tl.load(
        words_ptr + rows[None, :] * (INNER // 8) + places[:, None],
        mask=is_row[None, :] & (places < INNER // 8)[:, None],
        other=0,
    )
    scales = tl.load(
        scales_ptr + rows[None, :] * (INNER // GROUP) + groups[:, None],
        mask=is_row[None, :] & (groups < INNER // GROUP)[:, None],
        other=0.0,
    )
    # By group, not by word: else every scale would be loaded as often as its group has words.
    scales = tl.broadcast_to(scales[:, None, :], (GROUPS, WORDS // GROUPS, BLOCK_N)).reshape(WORDS, BLOCK_N)
    c0, c1, c2, c3, c4, c5, c6, c7 = expand(words, scales, table_ptr, NF4, PTX, DTYPE)
    even = tl.join(tl.join(c0, c4), tl.join(c2, c6))
    odd = tl.join(tl.join(c1, c5), tl.join(c3, c7))
    return tl.join(even, odd).permute(2, 3, 4, 0, 1).reshape(BLOCK_K, BLOCK_N)


@triton.jit
def expand(words, scales, table_ptr, NF4: tl.constexpr, PTX: tl.constexpr, DTYPE: tl.constexpr):
    """The weights of all words' first codes, of their second codes, and so on: eight tiles of the words' shape."""
    if NF4:
        if PTX:
            v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
                _NF4_FP32, _EIGHT_OF_ONE, [words, table_ptr], (tl.float32,) * 8, is_pure=True, pack=1
            )
        else:  # the earlier of two in the high half of its byte
            v0, v1 = tl.load(table_ptr + _code(words, 1)), tl.load(table_ptr + _code(words, 0))
            v2, v3 = tl.load(table_ptr + _code(words, 3)), tl.load(table_ptr + _code(words, 2))
            v4, v5 = tl.load(table_ptr + _code(words, 5)), tl.load(table_ptr + _code(words, 4))
            v6, v7 = tl.load(table_ptr + _code(words, 7)), tl.load(table_ptr + _code(words, 6))
    elif PTX:
        if tl.bfloat16 == DTYPE:
            v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
                _INT4_BF16, _EIGHT_OF_TWO, [words], (tl.bfloat16,) * 8, is_pure=True, pack=2
            )
        else:
            v0, v1, v2, v3, v4, v5, v6, v7 = tl.inline_asm_elementwise(
                _INT4_FP16, _EIGHT_OF_TWO, [words], (tl.float16,) * 8, is_pure=True, pack=2
            )
        OFFSET: tl.constexpr = 136.0 if tl.bfloat16 == DTYPE else 1032.0
        v0, v1, v2, v3 = v0 - OFFSET, v1 - OFFSET, v2 - OFFSET, v3 - OFFSET
        v4, v5, v6, v7 = v4 - OFFSET, v5 - OFFSET, v6 - OFFSET, v7 - OFFSET
    else:
        v0, v1, v2, v3 = _code(words, 0) - 8, _code(words, 1) - 8, _code(words, 2) - 8, _code(words, 3) - 8
        v4, v5, v6, v7 = _code(words, 4) - 8, _code(words, 5) - 8, _code(words, 6) - 8, _code(words, 7) - 8
    return (
        _scaled(v0, scales, DTYPE),
        _scaled(v1, scales, DTYPE),
        _scaled(v2, scales, DTYPE),
        _scaled(v3, scales, DTYPE),
        _scaled(v4, scales, DTYPE),
        _scaled(v5, scales, DTYPE),
        _scaled(v6, scales, DTYPE),
        _scaled(v7, scales, DTYPE),
    )


@triton.jit
def _code(words, place: tl.constexpr):
    return (words >> (4 * place)) & 15


@triton.jit
def _scaled(values, scales, DTYPE: tl.constexpr):
    """Values times scales, rounded once to `DTYPE`."""
    if values.dtype == DTYPE and scales.dtype == DTYPE:
        return values * scales  # Four bits times a scale is exact before this rounding, in fp32 or not.
    return narrow(values.to(tl.float32) * scales.to(tl.float32), DTYPE)
