"""Arguments of the wrong kind to any of the operators: one line that names the argument, before anything runs."""

import math

import pytest
import torch

from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.four_bit import quantize_int4, quantize_nf4
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.fused_moe_four_bit import fused_moe_four_bit, fused_moe_int4
from deepseek_kernels.fused_moe_fp8 import fused_moe_fp8
from deepseek_kernels.lora import LoraFactors

H, I, E, r = 16, 8, 3, 2  # noqa: E741


def operands():
    ids, weights = torch.zeros(4, 2, dtype=torch.int64), torch.ones(4, 2)
    return {
        "hidden_states": torch.ones(4, H),
        "gate_up_proj": torch.ones(E, 2 * I, H),
        "down_proj": torch.ones(E, H, I),
        "topk_indices": ids,
        "topk_weights": weights,
    }


def packed_operands():
    one = operands()
    found = {"hidden_states": one["hidden_states"]}
    for name in ("gate_up", "down"):
        pairs = [quantize_int4(matrix, 8) for matrix in one[f"{name}_proj"]]
        found |= {f"{name}_{part}": torch.stack([p[i] for p in pairs]) for i, part in enumerate(("packed", "scales"))}
    return found | {name: one[name] for name in ("topk_indices", "topk_weights")}


def refusal(function, *args, **settings):
    with pytest.raises(ValueError) as error:
        function(*args, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


FUNCTIONS = {
    "fused_moe": (fused_moe, operands),
    "fused_moe_fp8": (fused_moe_fp8, operands),
    "fused_moe_four_bit": (fused_moe_four_bit, operands),
    "fused_moe_int4": (fused_moe_int4, packed_operands),
}


@pytest.mark.parametrize("wrong", [None, [1.0], 3], ids=repr)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_tensor_is_named(name, wrong):
    function, make = FUNCTIONS[name]
    for argument in make():
        if name == "fused_moe_four_bit" and argument.endswith("_proj"):
            continue  # stacks, not tensors
        case = make()
        if name == "fused_moe_four_bit":
            case |= {key: None for key in ("gate_up_proj", "down_proj")}
        message = refusal(function, *{**case, argument: wrong}.values())
        assert message == f"{argument}: got {type(wrong).__name__}, expected a tensor"


@pytest.mark.parametrize("function", [fused_moe, fused_moe_fp8])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, b: (a, b), "gate_up_lora: got tuple, expected LoraFactors or None"),
        (lambda a, b: LoraFactors([1.0], b), "gate_up_lora.a: got list, expected a tensor"),
        (lambda a, b: LoraFactors(a, None), "gate_up_lora.b: got NoneType, expected a tensor"),
        (lambda a, b: LoraFactors(a, b, math.nan), "gate_up_lora.scaling: got nan, expected a finite number"),
        (lambda a, b: LoraFactors(a, b, math.inf), "gate_up_lora.scaling: got inf, expected a finite number"),
        (lambda a, b: LoraFactors(a[:0], b[:, :0]), "gate_up_lora.a: got shape (0, 16), expected (3 * r, 16)"),
        (lambda a, b: LoraFactors(a, b.t()), "gate_up_lora.b: got shape (6, 16), expected (16, 6)"),
    ],
)
def test_factors(function, change, message):
    factors = change(torch.ones(E * r, H), torch.ones(2 * I, r * E))
    assert refusal(function, **operands(), gate_up_lora=factors).startswith(message)


@pytest.mark.parametrize("quantize", [quantize_int4, quantize_nf4])
@pytest.mark.parametrize("group", [0, 4, 12, 24])
def test_groups_that_do_not_divide(quantize, group):
    assert refusal(quantize, torch.ones(4, 16), group).startswith(f"group_size: got {group}, expected a multiple of 8")


@pytest.mark.parametrize("name", ["limit", "alpha", "shift"])
def test_epilogues_of_no_numbers(name):
    assert refusal(Epilogue, **{name: "7"}) == f"{name}: got '7', expected a number"
