"""`fused_moe_four_bit` and `fused_moe_int4` on a CPU: `fused_moe` on the weights read back, and what they refuse."""

import pytest
import torch
from epilogue_cases import EPILOGUES
from four_bit_cases import assert_equals_reference, packed_case, results

from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
from deepseek_kernels.fused_moe_four_bit import fused_moe_four_bit, fused_moe_int4

SIZES = {"T": 9, "H": 40, "I": 24, "E": 5, "K": 3}


@pytest.mark.parametrize("name", ["int4", "nf4"])
@pytest.mark.parametrize("form", ["silu", "minimax_m3", "gpt_oss"])
@pytest.mark.parametrize("T", [0, 9, 120])
def test_biases_and_epilogues(name, form, T):
    """With a handful of rows, and with more than are decoded."""
    case = packed_case(torch.float32, name, 8, **{**SIZES, "T": T})
    activation = EPILOGUES.get(form, form)
    assert_equals_reference(results(case, activation), case, torch.float32, activation)


def test_tensors_of_compressed_tensors_are_the_same_layer():
    case = packed_case(torch.float32, "int4", 8, **SIZES)
    tensors = [t for one in case[1:3] for t in (one.codes, one.scales)]
    got = fused_moe_int4(case[0], *tensors, *case[3:5], gate_up_bias=case[5], down_bias=case[6])
    wanted = fused_moe_four_bit(*case[:5], gate_up_bias=case[5], down_bias=case[6])
    assert torch.equal(got, wanted)


def with_parts(packed, **parts):
    kept = {"codes": packed.codes, "scales": packed.scales, "shape": packed.shape, **parts}
    return PackedMatrices(kept["codes"], kept["scales"], kept["shape"], packed.format, packed.dtype)


def test_wrong_stacks_are_refused_in_one_line():
    case = packed_case(torch.float32, "int4", 8, **SIZES)[:5]
    down = case[2]
    for wrong, message in (
        (torch.ones(5, 40, 24), "down_proj: got Tensor, expected PackedMatrices"),
        (
            with_parts(down, codes=down.codes[:, 1:]),
            r"down_proj: got codes of shape \(5, 39, 3\), expected \(5, 40, 3\)",
        ),
        (
            with_parts(down, scales=down.scales[:4]),
            r"down_proj: got scales of shape \(4, 40, 3\), expected \(5, 40, 3\)",
        ),
        (with_parts(down, codes=down.codes.long()), "down_proj: got codes of torch.int64"),
        (with_parts(down, scales=down.scales.to("meta")), "down_proj: got scales on meta, expected cpu"),
        (with_parts(down, codes=down.codes.mT.contiguous().mT), "down_proj: got codes with strides"),
        (with_parts(down, shape=(5, 40, 20)), "down_proj's 20 inputs"),
        (case[1], r"gate_up_proj: got shape \(5, 48, 40\), expected \(5, 80, 40\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_moe_four_bit(*case[:2], wrong, *case[3:])
    with pytest.raises(ValueError, match="gate_up_proj: got device cpu, expected that of hidden_states, meta"):
        fused_moe_four_bit(case[0].to("meta"), *case[1:])
    bias = torch.zeros(5, 48, requires_grad=True)
    with pytest.raises(ValueError, match="gate_up_bias: got requires_grad"):
        fused_moe_four_bit(*case, gate_up_bias=bias)
    with pytest.raises(ValueError, match=r"gate_up_bias: got shape \(5, 47\), expected \(5, 48\)"):
        fused_moe_four_bit(*case, gate_up_bias=torch.zeros(5, 47))


def test_wrong_tensors_of_compressed_tensors_are_refused_in_one_line():
    codes, scales = FourBitFormat.of(4, "int4", 8).empty((2, 16, 8), torch.float32, "cpu")
    x, ids, weights = torch.ones(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    with pytest.raises(ValueError, match=r"gate_up_packed: got shapes \(16, 1\) and \(2, 16, 1\) of codes and scales"):
        fused_moe_int4(x, codes[0], scales, codes, scales, ids, weights)
    with pytest.raises(ValueError, match="group_size: got 4, expected a multiple of 8"):
        fused_moe_int4(x, codes, scales.repeat(1, 1, 2), codes, scales, ids, weights)
