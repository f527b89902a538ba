"""Rounding, scales and clipping on plain matrices."""

import pytest
import torch

from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
from deepseek_training.compress.awq_search import (
    candidate_scales,
    channel_weights,
    clip_limits,
    fake_quantize,
    quantize_int4,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rounding_gives_the_values_that_the_packed_codes_stand_for():
    matrix = random(24, 64)
    codes, scales = quantize_int4(matrix, 32)
    stack = PackedMatrices(codes[None], scales[None], (1, 24, 64), FourBitFormat("int4", 32), torch.float32)
    assert torch.equal(fake_quantize(matrix, 32), stack[0])


def test_more_bits_are_nearer():
    matrix = random(24, 64)
    errors = [(fake_quantize(matrix, 32, bits) - matrix).norm() for bits in (3, 4, 8)]
    assert errors[0] > 1.8 * errors[1] > 1.8 * 12 * errors[2] > 0


def test_the_identity_is_tried_first_and_is_all_of_an_empty_grid():
    x_mean, w_mean = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.5, 0.5, 0.5])
    scales = candidate_scales(x_mean, w_mean, 20, False)
    assert len(scales) == 21 and torch.equal(scales[0], torch.ones(3))
    torch.testing.assert_close(scales[-1], x_mean / 3.0, rtol=1e-4, atol=0)  # x_mean over the root of 1 x 9
    assert len(candidate_scales(x_mean, w_mean, 0, False)) == 1


def test_scales_stay_finite_where_a_channel_is_dead():
    x_mean = torch.tensor([0.0, 4.0, 9.0])
    for is_power_of_two in (False, True):
        scales = candidate_scales(x_mean, torch.tensor([0.0, 0.5, 1.0]), 20, is_power_of_two)
        assert all(bool((one > 0).all() and one.isfinite().all()) for one in scales)
    assert all(torch.equal(one, torch.exp2(one.log2().round())) for one in scales)


def test_a_channels_share_of_its_groups_largest_weight():
    matrix = torch.tensor([[1.0, -2.0, 4.0, 4.0], [0.0, 5.0, 0.0, -8.0]])
    torch.testing.assert_close(channel_weights(matrix, 2), torch.tensor([0.25, 1.0, 0.5, 1.0]))


@pytest.mark.parametrize("bits", [3, 4])
def test_clipping_lowers_each_groups_error_and_cuts_only_where_it_does(bits):
    matrix, inputs = random(40, 64), random(50, 64, seed=1)
    limit = clip_limits(matrix, inputs, 32, bits)
    groups = matrix.reshape(40, 2, 32)
    assert (limit <= groups.abs().amax(2, keepdim=True)).all() and (limit > 0).all()
    clipped = torch.minimum(torch.maximum(groups, -limit), limit).reshape(matrix.shape)

    def errors(values):
        change = (fake_quantize(values, 32, bits) - matrix).reshape(40, 2, 32)
        return torch.einsum("ngc,mgc->mgn", inputs.reshape(50, 2, 32), change).square().sum(2)

    assert (errors(clipped) <= errors(matrix) * (1 + 1e-4)).all()
    assert errors(clipped).sum() < 0.95 * errors(matrix).sum()


def test_without_tokens_nothing_is_clipped():
    matrix = random(4, 16)
    assert torch.equal(clip_limits(matrix, torch.empty(0, 16), 8), matrix.reshape(4, 2, 8).abs().amax(2, keepdim=True))
