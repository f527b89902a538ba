"""Rounds a matrix column by column, each later column making up for the errors of those before it.

With C = X^T X of the inputs, the output's squared error is the sum over rows of d C d, d the change of the weights. A
column that is rounded leaves an error; the best change of the columns behind it lies in the Cholesky factor of C^-1.
`awq` calls it with scales that are settled before, so that what comes out is codes times these.

Axes: n tokens, M outputs, N inputs, G groups of N / G inputs.

Reference:
    Frantar et al. 2022, arXiv 2210.17323 (GPTQ), algorithm 1, in the order of the columns; C gets a hundredth of its
    mean diagonal more on the diagonal, as there.
"""

import torch
from torch import Tensor

_DAMPING = 0.01
_COLUMNS = 64  # that are rounded before the rest is changed


def round_with_feedback(matrix: Tensor, inputs: Tensor, scales: Tensor, bits: int = 4) -> Tensor:
    """Return rounded weights, codes times scales, `[M, N]` in fp32.

    Args:
        matrix: `[M, N]`.
        inputs: `[n, N]`, of any number of tokens; with none it is rounding to nearest.
        scales: `[M, G]`.
        bits: Codes are from -2^(bits-1) on.
    """
    rest, rounded = matrix.float().clone(), torch.empty_like(matrix, dtype=torch.float32)
    factor, half = _inverse_factor(inputs.float()), 2 ** (bits - 1)
    each = scales.float().repeat_interleave(matrix.shape[1] // scales.shape[1], dim=1)
    for start in range(0, matrix.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        columns, own = rest[:, part].clone(), factor[part, part]
        errors = torch.empty_like(columns)
        for place in range(columns.shape[1]):
            scale = each[:, start + place]
            value = (columns[:, place] / scale).round().clamp(-half, half - 1) * scale
            rounded[:, start + place] = value
            errors[:, place] = (columns[:, place] - value) / own[place, place]
            columns[:, place:] -= torch.outer(errors[:, place], own[place, place:])
        rest[:, part.stop :] -= errors @ factor[part, part.stop :]
    return rounded


def _inverse_factor(inputs: Tensor) -> Tensor:
    """The upper Cholesky factor of C^-1, `[N, N]`."""
    moments = (inputs.T @ inputs).double()
    mean = float(moments.diagonal().mean())
    moments += torch.eye(len(moments), dtype=moments.dtype, device=moments.device) * (_DAMPING * mean if mean else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    return torch.linalg.cholesky(inverse, upper=True).float()
