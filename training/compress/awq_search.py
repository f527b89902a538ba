"""What AWQ searches, on plain tensors: scales of input channels, and the scales by which groups are rounded.

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
    "fake_quantize",
    "group_scales",
    "power_of_two",
    "quantize_int4",
    "round_by",
    "search_scales",
]

# Of a group's largest weight over 7.5. The first is taken where nothing tells them apart; with 15 / 16 the largest is
# code -8, so that weights that llama.cpp rounded to Q4_0 stay what they are.
_SHARES = (1.0, 1.2, 1.15, 1.1, 1.05, 15 / 16, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55)
_ROWS = 1024  # of a matrix that are searched at once


def fake_quantize(matrix: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """Return the values that a matrix has after rounding, `[M, N]` in fp32.

    Args:
        matrix: `[M, N]`.
        group_size: g, a divisor of N.
        bits: At least 2; 4 gives what `quantize_int4` stores.
    """
    return round_by(matrix, group_scales(matrix, group_size, bits), bits)


def round_by(matrix: Tensor, scales: Tensor, bits: int = 4) -> Tensor:
    """Return a matrix rounded by given scales, `[M, N]` in fp32.

    Args:
        matrix: `[M, N]`.
        scales: `[M, G]`, of either sign.
        bits: As for `fake_quantize`.
    """
    groups, half = matrix.float().reshape(*scales.shape, -1), 2 ** (bits - 1)
    each = scales.unsqueeze(2)
    return ((groups / each).round().clamp(-half, half - 1) * each).reshape(matrix.shape)


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


def search_scales(matrix: Tensor, inputs: Tensor, group_size: int, bits: int = 4) -> Tensor:
    """Return the scales `[M, G]` by which each group's part of the output changes least.

    Tried are shares of `group_scales`, smaller ones cut the largest weights off, and the same with the sign changed:
    there is one code more below zero than above, and which side needs it differs from group to group. The part's
    squared error is d C d with d the weights' change and C the inputs' second moments.

    Args:
        matrix: `[M, N]`.
        inputs: `[n, N]`; without tokens the scales are those of `group_scales`.
        group_size: g.
        bits: As for `fake_quantize`.
    """
    num_groups = matrix.shape[1] // group_size
    columns = inputs.float().reshape(len(inputs), num_groups, group_size).transpose(0, 1)
    moments = columns.transpose(1, 2) @ columns
    return torch.cat([_search_rows(rows, moments, bits) for rows in matrix.float().split(_ROWS)])


def _search_rows(matrix: Tensor, moments: Tensor, bits: int) -> Tensor:
    size = moments.shape[1]
    groups = matrix.reshape(len(matrix), -1, size)
    nearest = group_scales(matrix, size, bits)
    best, least = nearest, torch.full_like(nearest, math.inf)
    for share in _SHARES:
        for scales in (nearest * share, nearest * -share):
            change = round_by(matrix, scales, bits).reshape(groups.shape) - groups
            moved = torch.bmm(change.transpose(0, 1), moments).transpose(0, 1)
            error = (moved * change).sum(2)
            is_better = error < least
            best, least = torch.where(is_better, scales, best), torch.where(is_better, error, least)
    return best
