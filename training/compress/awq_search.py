"""What AWQ searches, on plain tensors: scales of input channels, and limits to which weights are clipped.

Weights are rounded as `deepseek_kernels.four_bit.quantize_int4` rounds them. A scale s is folded where the channel
comes from, and W s is what is stored:

    L(s) = sum over tokens ||Q(W s) (x / s) - W x||^2,    s = x_mean^a / (w_mean^(1-a) + 1e-4)

with x_mean the channel's mean |x| and w_mean the mean of its weights' |w| / (largest of their group). `awq` calls it.

Axes: n tokens, M outputs, N inputs, G groups of g inputs.

Reference:
    Lin et al. 2023, arXiv 2306.00978 (AWQ). The formula is that of AutoAWQ and llm-compressor; the identity is tried
    too, which they added later.
"""

import math

import torch
from torch import Tensor

from deepseek_kernels.four_bit import quantize_int4

__all__ = [
    "candidate_scales",
    "channel_weights",
    "clip_limits",
    "fake_quantize",
    "group_scales",
    "power_of_two",
    "quantize_int4",
]

_NUM_LIMITS, _LIMIT_STEPS = 10, 20
_ROWS = 1024  # of a matrix whose clipping is searched at once


def fake_quantize(matrix: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """Return the values that a matrix has after rounding, `[M, N]` in fp32.

    Args:
        matrix: `[M, N]`.
        group_size: g, a divisor of N.
        bits: At least 2; 4 gives what `quantize_int4` stores.
    """
    groups = matrix.float().reshape(matrix.shape[0], -1, group_size)
    half = 2 ** (bits - 1)
    scales = group_scales(matrix, group_size, bits).unsqueeze(2)
    return ((groups / scales).round().clamp(-half, half - 1) * scales).reshape(matrix.shape)


def group_scales(matrix: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """Return the scales that a matrix is rounded by, `[M, G]` in fp32.

    Args:
        matrix: `[M, N]`.
        group_size: g, a divisor of N.
        bits: As for `fake_quantize`.
    """
    largest = matrix.float().reshape(matrix.shape[0], -1, group_size).abs().amax(2)
    return (largest / (2 ** (bits - 1) - 0.5)).clamp(min=1e-12)


def channel_weights(matrix: Tensor, group_size: int) -> Tensor:
    """Return each input channel's share of the largest weight in its group, averaged over outputs, `[N]`.

    Args:
        matrix: `[M, N]`.
        group_size: g.
    """
    groups = matrix.float().abs().reshape(matrix.shape[0], -1, group_size)
    return (groups / groups.amax(2, keepdim=True).clamp(min=1e-12)).reshape(matrix.shape).mean(0)


def candidate_scales(x_mean: Tensor, w_mean: Tensor, grid: int, is_power_of_two: bool) -> list[Tensor]:
    """Return scales to try, `[N]` each; the first is the identity.

    Args:
        x_mean: `[N]`, mean magnitude of the channels.
        w_mean: `[N]`, from `channel_weights`.
        grid: How many beside the identity.
        is_power_of_two: Round them, so that folding changes no bit of what the model computes.
    """
    found = [torch.ones_like(x_mean)]
    for step in range(1, grid + 1):
        share = step / grid
        scale = (x_mean.pow(share) / (w_mean.pow(1 - share) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        found.append(power_of_two(scale) if is_power_of_two else scale)
    return [scale for scale in found if bool(torch.isfinite(scale).all())]


def power_of_two(scale: Tensor) -> Tensor:
    """Return the nearest powers of two.

    Args:
        scale: Positive numbers.
    """
    return torch.exp2(scale.log2().round())


def clip_limits(matrix: Tensor, inputs: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """Return `[M, G, 1]`: the magnitude to which each group is clipped before it is rounded.

    Tried are the largest magnitude and nine smaller ones down to 55 % of it; kept is what changes the group's part of
    the output least. That part's squared error is d C d with d the weights' change and C the inputs' second moments.

    Args:
        matrix: `[M, N]`.
        inputs: `[n, N]`; without tokens the limits are the largest magnitudes.
        group_size: g.
        bits: As for `fake_quantize`.
    """
    num_groups = matrix.shape[1] // group_size
    columns = inputs.float().reshape(len(inputs), num_groups, group_size).transpose(0, 1)
    moments = columns.transpose(1, 2) @ columns
    return torch.cat([_limits(rows, moments, group_size, bits) for rows in matrix.float().split(_ROWS)])


def _limits(matrix: Tensor, moments: Tensor, group_size: int, bits: int) -> Tensor:
    groups = matrix.reshape(len(matrix), -1, group_size)
    largest = groups.abs().amax(2, keepdim=True)
    best, least = largest, torch.full_like(largest, math.inf)
    for step in range(_NUM_LIMITS):
        limit = largest * (1 - step / _LIMIT_STEPS)
        clipped = torch.minimum(torch.maximum(groups, -limit), limit)
        change = fake_quantize(clipped.reshape(matrix.shape), group_size, bits).reshape(groups.shape) - groups
        moved = torch.bmm(change.transpose(0, 1), moments).transpose(0, 1)
        error = (moved * change).sum(2, keepdim=True)
        is_better = error < least
        best, least = torch.where(is_better, limit, best), torch.where(is_better, error, least)
    return best
