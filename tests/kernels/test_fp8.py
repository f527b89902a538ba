"""FP8 codes and scales: bit for bit against an independent rounding, at every edge, and what powers of two are for."""

import pytest
import torch
from fp8_cases import float32_scales, rounded, special_rows

from deepseek_kernels.fp8 import GROUP, dequantize, power_of_two_scale, quantize_blocks, quantize_rows, rounded_rows

# Every finite E4M3 number, in float64.
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
FINITE = CODES[CODES.isfinite()].unique()


def nearest_code(values):
    """The E4M3 number nearest to each of `values`, ties to the even code: by looking at all of them."""
    bits = FINITE.to(torch.float8_e4m3fn).view(torch.uint8)
    distance = (values.double().unsqueeze(-1) - FINITE).abs()
    least = distance == distance.amin(-1, keepdim=True)
    is_even = bits % 2 == 0
    choice = torch.where(least & is_even, 2, least.int()).argmax(-1)
    return FINITE[choice]


def scale_of(group):
    """The least power of two that brings the group to 448 or below, by trying."""
    amax = max(abs(value) for value in group)
    exponent = -108
    while amax > 448 * 2.0**exponent:
        exponent += 1
    return 2.0**exponent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows(dtype):
    x = special_rows().to(dtype)
    codes, scales = quantize_rows(x)
    assert codes.shape == x.shape and codes.dtype == torch.float8_e4m3fn and scales.shape == (8, 3)
    for row in range(8):
        for group in range(3):
            part = slice(group * GROUP, (group + 1) * GROUP)
            values = x[row, part].double()
            scale = scale_of(values.tolist())
            assert scales[row, group].item() == scale
            assert torch.equal(codes[row, part].double(), nearest_code(values / scale)), (row, group)


def test_blocks_and_those_of_the_transpose():
    weights = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    weights[130:, :128] = 0
    weights[:128, 128:256] *= 1e-20
    codes, scales = quantize_blocks(weights)
    assert scales.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            part = (slice(i * GROUP, (i + 1) * GROUP), slice(j * GROUP, (j + 1) * GROUP))
            scale = scale_of(weights[part].flatten().double().tolist())
            assert scales[i, j].item() == scale
            assert torch.equal(codes[part].double(), nearest_code(weights[part].double() / scale))
    turned, turned_scales = quantize_blocks(weights.T.contiguous())
    assert torch.equal(turned.view(torch.uint8), codes.view(torch.uint8).T)
    assert torch.equal(turned_scales, scales.T)


def test_minus_zero_nan_and_infinity():
    x = torch.zeros(3, 256)
    x[0, 3] = -0.0
    x[1, 3], x[2, 130] = float("nan"), float("inf")
    x[1:, 5] = 1.0
    codes, _ = quantize_rows(x)
    assert codes[0, 3].view(torch.uint8) == 0x80 and codes[0, 4].view(torch.uint8) == 0
    back = rounded_rows(x)
    assert back[1, :128].isnan().all() and (back[1, 128:] == 0).all()
    assert back[2, 128:].isnan().all() and back[2, 5] == 1


def test_codes_times_scales_are_exact_in_bf16():
    back = rounded_rows(special_rows())
    assert torch.equal(back.bfloat16().float(), back)


@pytest.mark.parametrize("amax,scale", [(448.0, 1), (448.0001, 2), (224.0, 0.5), (1.0, 2**-8), (0.0, 2.0**-108)])
def test_scales(amax, scale):
    assert power_of_two_scale(torch.tensor([amax])).item() == scale


def test_rounding_again_along_columns_changes_nothing_to_speak_of():
    """So the transposed copies that weight gradients in FP8 would need come free; with float32 scales they do not."""
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(2))

    def again_against_directly(rounded):
        again, directly = rounded(rounded(x).T), rounded(x.T)
        return ((again - directly).norm() / directly.norm()).item()

    assert again_against_directly(rounded_rows) <= 1e-4
    assert again_against_directly(lambda t: rounded(t, float32_scales)) > 0.01


def test_gradients_of_any_size_keep_their_precision():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    for size in (1.0, 1e-9, 1e-25):
        assert (rounded_rows(x * size) - x * size).norm() <= 0.03 * (x * size).norm()
    spread = x * torch.logspace(-10, 0, 64).unsqueeze(1)
    errors = (rounded_rows(spread) - spread).norm(dim=1) / spread.norm(dim=1)
    assert errors.median() <= 0.03


def test_dequantize_with_blocks_of_another_size():
    codes = torch.ones(3, 5).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert dequantize(codes, scales, (2, 2)).tolist() == [[1, 1, 2, 2, 3]] * 2 + [[4, 4, 5, 5, 6]]
