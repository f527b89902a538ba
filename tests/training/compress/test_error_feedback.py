"""Rounding with error feedback: on the grid, exact where nothing is rounded, and nearer in output than to nearest."""

import pytest
import torch

from deepseek_kernels.four_bit import quantize_int4
from deepseek_training.compress.awq_search import fake_quantize, group_scales
from deepseek_training.compress.error_feedback import round_with_feedback


def problem(num_tokens=600, seed=0):
    """Weights, and inputs whose channels go together as those of a network do."""
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(160, 160, generator=draw)
    return torch.randn(24, 160, generator=draw), torch.randn(num_tokens, 160, generator=draw) @ mixing


def loop(matrix, inputs, scales):
    """Column by column, the best change of all that is left found by least squares, without any factorization."""
    inputs, rest, group = inputs.double(), matrix.double().clone(), matrix.shape[1] // scales.shape[1]
    moments = inputs.T @ inputs
    moments += torch.eye(len(moments)).double() * moments.diagonal().mean() * 0.01
    for place in range(rest.shape[1]):
        scale = scales[:, place // group].double()
        error = rest[:, place] - (rest[:, place] / scale).round().clamp(-8, 7) * scale
        rest[:, place] -= error
        behind = slice(place + 1, None)
        if place + 1 < rest.shape[1]:
            rest[:, behind] += torch.outer(error, torch.linalg.solve(moments[behind, behind], moments[behind, place]))
    return rest.float()


@pytest.mark.parametrize("num_tokens", [0, 1, 40, 600])
def test_it_is_the_loop_that_mends_what_is_left_after_each_column(num_tokens):
    matrix, inputs = problem(num_tokens)
    scales = group_scales(matrix, 32)
    found = round_with_feedback(matrix, inputs, scales)
    expected = fake_quantize(matrix, 32) if not num_tokens else loop(matrix, inputs, scales)
    codes = found / scales.repeat_interleave(32, 1)
    assert torch.equal(codes.round().clamp(-8, 7), codes.round()) and (codes - codes.round()).abs().max() < 1e-4
    is_same = (found - expected).abs() < 1e-3 * scales.repeat_interleave(32, 1)
    assert is_same.float().mean() > 0.99, "but for ties and what follows them in a row"


def test_the_output_is_nearer_than_by_rounding_to_nearest():
    matrix, inputs = problem()
    _, unseen = problem(seed=0)[0], problem(num_tokens=900)[1][600:]
    scales = group_scales(matrix, 32)
    for tokens in (inputs, unseen):
        nearest, fed_back = (
            ((rounded - matrix) @ tokens.T).square().mean()
            for rounded in (fake_quantize(matrix, 32), round_with_feedback(matrix, inputs, scales))
        )
        assert fed_back < 0.7 * nearest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_packed_by_its_scales_is_the_same_codes(dtype):
    matrix, inputs = problem()
    scales = group_scales(matrix, 32)
    rounded = round_with_feedback(matrix, inputs, scales)
    packed, kept = quantize_int4(rounded.to(dtype), 32, scales)
    codes = torch.stack([(packed >> 4 * place & 15) - 8 for place in range(8)], dim=2).reshape(matrix.shape)
    assert torch.equal(codes, (rounded / scales.repeat_interleave(32, 1)).round().int()) and kept.dtype == dtype
