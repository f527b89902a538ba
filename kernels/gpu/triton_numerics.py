"""What every Triton kernel here does to numbers: multiply tiles, round, and activate.

The kernels import these functions. Surprising: Triton's interpreter holds a bf16 value as its bit pattern and computes
on the bits, and it truncates where a GPU rounds to nearest even
(https://github.com/triton-lang/triton/issues/4972). Under it operands are therefore widened before any arithmetic
and rounded by integer arithmetic, which gives torch's bf16 bit for bit; compiled kernels contain none of this.
"""

import torch
import triton
import triton.language as tl

# Read once: kernels are decorated at import, so the environment must be set before.
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(IS_INTERPRETED)

# With every launch: said aloud, for Triton 3.10 takes the other way, and 3.9 warns of it.
LAUNCH = {"enable_fp_fusion": True}

TRITON_DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the type tiles are summed in: fp64 for fp64, else fp32.

    Args:
        dtype: Of the operands.
    """
    return tl.float64 if dtype == torch.float64 else tl.float32


@triton.jit
def multiply(left, right, accumulated, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """``accumulated + left @ right`` in the accumulator's type."""
    if INTERPRETED:
        left = left.to(ACC)
        right = right.to(ACC)
        return accumulated + tl.dot(left, right, input_precision="ieee", out_dtype=ACC)
    return tl.dot(left, right, accumulated, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """`x` rounded to nearest even in `DTYPE`."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(DTYPE)


@triton.jit
def activate(gate, ACTIVATION: tl.constexpr):
    """The activation and its derivative at `gate`, in the type of `gate`."""
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        return gate * sigmoid, sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        return gate * cdf, cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    else:
        # tanh(u) = 2 sigmoid(2u) - 1: Triton has no tanh of its own on every target.
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        half = 1.0 / (1.0 + tl.exp(-2.0 * inner))
        slope = 2.0 * half * (1.0 - half) * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * gate * gate)
        return gate * half, half + gate * slope
