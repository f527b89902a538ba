"""FP8 (E4M3) with scales that are powers of two: rows in groups of 128, weights in blocks of 128 x 128.

DeepSeek-V3's recipe for activations and weights. A power of two divides exactly: a value's code is what torch rounds
`x / scale` to, code times scale is exact in bf16 (four significant bits), and quantizing again along the other
dimension changes next to nothing, where a float32 scale would round a second time.

    scale = the least power of two with amax / scale <= 448        code = round_to_nearest_even(x / scale)

Nothing is random and nothing is remembered between calls, so recomputation gives the same codes. A group with NaN or
infinity becomes NaN, all of it: E4M3 has no infinity, and saturating would hide one.

Reference: DeepSeek-AI 2024, arXiv 2412.19437, section 3.3.2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 128
FP8 = torch.float8_e4m3fn
# The largest E4M3 number is 0.875 * 2^9.
_LARGEST_MANTISSA, _LARGEST_EXPONENT = 0.875, 9
# Below, scales stop: gradients of size 1e-9 must not be rounded to zero, and 2^108 must remain a float32.
_LEAST_AMAX = 2.0**-100


def power_of_two_scale(amax: Tensor) -> Tensor:
    """Return the least power of two that brings `amax` to 448 or below; NaN for NaN and infinity.

    Args:
        amax: Largest magnitudes, float32.
    """
    mantissa, exponent = torch.frexp(amax.clamp(min=_LEAST_AMAX))
    exponent = exponent - _LARGEST_EXPONENT + (mantissa > _LARGEST_MANTISSA)
    return torch.where(amax.isfinite(), torch.ldexp(torch.ones_like(amax), exponent), torch.nan)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [R, C] and scales [R, ceil(C / 128)].

    Args:
        x: [R, C], any float dtype.
    """
    rows, columns = x.shape
    groups = F.pad(x.float(), (0, -columns % GROUP)).view(rows, -(-columns // GROUP), GROUP)
    scales = power_of_two_scale(groups.abs().amax(-1))
    codes = (groups * scales.reciprocal().unsqueeze(-1)).to(FP8)
    return codes.flatten(1)[:, :columns], scales


def quantize_blocks(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes [M, N] and scales [ceil(M / 128), ceil(N / 128)]; those of the transpose are their transposes.

    Args:
        weights: [M, N], any float dtype.
    """
    height, width = weights.shape
    padded = F.pad(weights.float(), (0, -width % GROUP, 0, -height % GROUP))
    blocks = padded.view(padded.shape[0] // GROUP, GROUP, padded.shape[1] // GROUP, GROUP)
    scales = power_of_two_scale(blocks.abs().amax((1, 3)))
    codes = (blocks * scales.reciprocal()[:, None, :, None]).to(FP8)
    return codes.view(padded.shape)[:height, :width], scales


def dequantize(codes: Tensor, scales: Tensor, group: tuple[int, int]) -> Tensor:
    """Return codes times their scales, in float32.

    Args:
        codes: [M, N].
        scales: One for each group, those at the edges included.
        group: Rows and columns of a group.
    """
    spread = scales.float().repeat_interleave(group[0], 0)[: codes.shape[0]]
    return codes.float() * spread.repeat_interleave(group[1], 1)[:, : codes.shape[1]]


def rounded_rows(x: Tensor) -> Tensor:
    """Return `x` [R, C] as FP8 rows hold it, in float32.

    Args:
        x: [R, C].
    """
    return dequantize(*quantize_rows(x), (1, GROUP))


def rounded_blocks(weights: Tensor) -> Tensor:
    """Return `weights` [M, N] as FP8 blocks hold them, in float32.

    Args:
        weights: [M, N].
    """
    return dequantize(*quantize_blocks(weights), (GROUP, GROUP))
