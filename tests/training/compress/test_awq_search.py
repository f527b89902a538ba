"""Rounding, scales and clipping on plain matrices."""

import pytest
import torch

from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
from deepseek_training.compress.awq_search import (
    candidate_scales,
    channel_weights,
    fake_quantize,
    group_scales,
    quantize_int4,
    round_by,
    search_scales,
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


def errors_of(change, inputs, size):
    """Squared error of each group's part of the output, [M, G]."""
    groups = change.reshape(len(change), -1, size)
    parts = inputs.reshape(len(inputs), -1, size)
    return torch.einsum("ngc,mgc->mgn", parts, groups).square().sum(2)


@pytest.mark.parametrize("bits", [3, 4])
def test_searched_scales_lower_each_groups_error_and_take_either_sign(bits):
    matrix, inputs = random(40, 64), random(50, 64, seed=1)
    largest, found = group_scales(matrix, 32, bits), search_scales(matrix, inputs, 32, bits)
    assert (found.abs() <= 1.2001 * largest).all() and (found.abs() >= 0.5499 * largest).all()
    assert 0.2 < (found < 0).float().mean() < 0.8
    errors = errors_of(round_by(matrix, found, bits) - matrix, inputs, 32)
    nearest = errors_of(fake_quantize(matrix, 32, bits) - matrix, inputs, 32)
    assert (errors <= nearest * (1 + 1e-4)).all() and errors.sum() < 0.8 * nearest.sum()
    for share in (-1.2, -0.9, 0.55, 0.8):  # some of what was tried
        tried = errors_of(round_by(matrix, largest * share, bits) - matrix, inputs, 32)
        assert (errors <= tried * (1 + 1e-4)).all()


def test_weights_on_the_grid_of_q4_0_stay_what_they_are():
    """Those on -8..7 by a positive scale, those on -7..8 by a negative one only."""
    codes, inputs = torch.arange(16).float() - 8, random(40, 32, seed=1)
    matrix = torch.stack([torch.cat([codes, -codes]), torch.cat([-codes, codes])]) * 0.3
    found = search_scales(matrix, inputs, 16)
    torch.testing.assert_close(found, torch.tensor([[0.3, -0.3], [-0.3, 0.3]]))
    torch.testing.assert_close(round_by(matrix, found), matrix)


def test_packed_codes_of_a_negative_scale_stand_for_the_same_values():
    matrix = random(24, 64)
    scales = -group_scales(matrix, 32)
    codes, kept = quantize_int4(round_by(matrix, scales), 32, scales)
    stack = PackedMatrices(codes[None], kept[None], (1, 24, 64), FourBitFormat("int4", 32), torch.float32)
    assert torch.equal(stack[0], round_by(matrix, scales))


def test_without_tokens_the_scales_are_those_of_the_largest_weights():
    matrix = random(4, 16)
    assert torch.equal(search_scales(matrix, torch.empty(0, 16), 8), group_scales(matrix, 8))
