"""NF4 and int4 codes against independent readings of both formats, and `fused_moe` on them against dense weights."""

import pytest
import torch
from four_bit_cases import pack, unpacked
from test_lora import SHAPES, TOLERANCE, assert_near, make

from deepseek_kernels.cpu import staged
from deepseek_kernels.four_bit import GROUP_SIZES, NF4, FourBitFormat, quantize_int4, quantize_nf4
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.lora import LoraFactors, fused_moe_lora


def matrix(dtype=torch.float32, shape=(24, 64)):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values[0], values[1, 3] = 0, 40.0  # A group of zeros, and an outlier.
    return values.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_takes_the_nearest_value(dtype):
    weights = matrix(dtype)
    codes, largest = quantize_nf4(weights, 64)
    groups = weights.double().reshape(-1, 64)
    assert torch.equal(largest.double(), groups.abs().amax(1))
    halves = torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()
    table = torch.tensor(NF4, dtype=torch.float64)
    error = (table[halves] - (groups / groups.abs().amax(1, keepdim=True).clamp(min=1e-30)).flatten()).abs()
    best = ((groups / groups.abs().amax(1, keepdim=True).clamp(min=1e-30)).flatten()[:, None] - table).abs().amin(1)
    torch.testing.assert_close(error, best, rtol=0, atol=1e-6)
    assert set(halves[:64].tolist()) == {7}, "zeros stay zeros"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_equals_bitsandbytes_bit_for_bit(dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = matrix(dtype, (256, 384))
    packed, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    codes, largest = quantize_nf4(weights, 64)
    assert torch.equal(codes, packed.flatten()) and torch.equal(largest, state.absmax)


def test_int4_is_compressed_tensors_packing():
    """A word read by hand: eight codes along the input, lowest bits first, offset 8."""
    weights = torch.tensor([[-7.5, 7.5, 0.0, 1.0, -1.0, 3.4, -3.6, 6.6]])
    packed, scales = quantize_int4(weights, 8)
    assert scales.tolist() == [[1.0]]
    word = packed.item() & 0xFFFFFFFF
    assert [(word >> 4 * place & 15) - 8 for place in range(8)] == [-8, 7, 0, 1, -1, 3, -4, 7]


def test_every_int4_code_survives():
    codes = torch.arange(16).repeat(4).view(2, 32) - 8
    fmt = FourBitFormat.of(4, "int4", 32)
    packed = pack((codes * 7.5 / 8).float().unsqueeze(0), fmt)  # The scale is then 1 but for rounding of 7.5 / 8.
    assert torch.equal(
        (unpacked(packed)[0] / packed.scales[0].repeat_interleave(32, 1)).round().sort().values[0][:2],
        torch.tensor([-8.0, -8.0]),
    )


@pytest.mark.parametrize("name", GROUP_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_back_is_near_and_small(name, dtype):
    stack = torch.stack([matrix(dtype, (24, 128)), 0.02 * matrix(dtype, (24, 128))])
    packed = pack(stack, FourBitFormat.of(4, name, None))
    error = (unpacked(packed).double() - stack.double()).norm() / stack.double().norm()
    assert 0.02 < error < 0.25, "an outlier lies in one group of int4's 128"
    num_bytes = sum(t.numel() * t.itemsize for t in (packed.codes, packed.scales))
    assert num_bytes <= 0.55 * stack.numel()


@pytest.mark.parametrize("name", GROUP_SIZES)
@pytest.mark.parametrize("shape", ["few", "grouped", "many", "loop"])
def test_layer_equals_the_one_with_weights_read_back(name, shape, monkeypatch):
    if shape == "loop":
        monkeypatch.setattr(staged, "MAX_BYTES", 0)
    num_tokens, _, _, num_experts, num_slots, rank = SHAPES[shape]
    case = make((num_tokens, 32, 24, num_experts, num_slots, rank), torch.float32)
    fmt = FourBitFormat.of(4, name, 8)
    packed = [pack(case[weight], fmt) for weight in ("gate_up_proj", "down_proj")]
    leaves = [case["x"], case["weights"], case["gate_up"].a, case["gate_up"].b, case["down"].a, case["down"].b]
    factors = (case["gate_up"], case["down"])
    output = fused_moe_lora((case["x"], *packed, case["ids"], case["weights"]), *factors, "silu")
    dense = [unpacked(one) for one in packed]
    expected = fused_moe(
        case["x"], *dense, case["ids"], case["weights"], gate_up_lora=factors[0], down_lora=factors[1]
    )
    got = [output, *torch.autograd.grad(output, leaves, case["grad"])]
    assert_near(got, [expected, *torch.autograd.grad(expected, leaves, case["grad"])], TOLERANCE[torch.float32])
    # Without an adapter: output, x and router weights.
    output = fused_moe_lora((case["x"], *packed, case["ids"], case["weights"]), None, None, "silu")
    expected = fused_moe(case["x"], *dense, case["ids"], case["weights"])
    got = [output, *torch.autograd.grad(output, leaves[:2], case["grad"])]
    assert_near(got, [expected, *torch.autograd.grad(expected, leaves[:2], case["grad"])], TOLERANCE[torch.float32])


def test_gradients_by_differences():
    case = make((5, 8, 8, 3, 2, 2), torch.float64)
    packed = [pack(case[weight], FourBitFormat.of(4, "int4", 8)) for weight in ("gate_up_proj", "down_proj")]

    def run(x, weights, a, b):
        return fused_moe_lora((x, *packed, case["ids"], weights), LoraFactors(a, b, 2.0), None, "silu")

    leaves = (case["x"], case["weights"], case["gate_up"].a, case["gate_up"].b)
    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((8, "nf4", None), "bits: got 8, expected 4"),
        ((4, "fp4", None), "format: got 'fp4', expected one of nf4, int4"),
        ((4, "int4", 12), "group_size: got 12, expected a multiple of 8"),
    ],
)
def test_formats_that_do_not_exist_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FourBitFormat.of(*settings)


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="group_size: got 32, expected a divisor of down_proj's 24 inputs"):
        FourBitFormat.of(4, "int4", 32).check("down_proj", (2, 32, 24))
