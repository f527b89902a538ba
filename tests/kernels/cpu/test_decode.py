"""The decoding path of `fused_moe` on a CPU: its plan, and its results against the reference in float64."""

import pytest
import torch
from moe_cases import assert_close, assert_equals_reference, gradients, in_float64, make_case

from deepseek_kernels.cpu import decode
from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference

PATTERNS = ["any", "some_unused", "empty_experts", "one_expert", "all_unused", "every_expert"]


@pytest.fixture
def plans(monkeypatch):
    """The plans made during a test: a test of the decoding path has to see that it was taken."""
    made = []
    original = decode.make_plan
    monkeypatch.setattr(decode, "make_plan", lambda *a: made.append(original(*a)) or made[-1])
    return made


@pytest.mark.parametrize("T", [0, 1, 7, 40])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference(dtype, pattern, T, plans):
    case = [t.detach() for t in make_case(dtype, T=T, H=35, I=19, E=6, K=6, pattern=pattern)]
    output = fused_moe(*case)
    assert len(plans) == 1
    assert_close("output", output, fused_moe_reference(*in_float64(case)), dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_after_it(dtype, pattern, plans):
    case = make_case(dtype, T=9, E=6, K=6, pattern=pattern)
    got = gradients(fused_moe, case)
    assert len(plans) == 1
    assert_equals_reference(got, case, dtype)


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
def test_activations(activation, plans):
    case = [t.detach() for t in make_case(torch.bfloat16, T=9)]
    wanted = fused_moe_reference(*in_float64(case), activation=activation)
    assert_close("output", fused_moe(*case, activation=activation), wanted, torch.bfloat16)
    assert len(plans) == 1


def test_plan_batches_bf16_neighbors_and_pads_with_their_own_rows():
    plan = decode.make_plan([2, 3, 3, 6, 9, 4], 7, torch.bfloat16)
    assert plan.batches == [(2, 1, 3, 2), (6, 1, 1, 1)]
    assert plan.row_slot == [0, 0, 1, 2, 5, 5, 3]
    assert plan.slot_row == [0, 2, 3, 6, 7, 4]


def test_plan_pairs_fp32_experts_of_the_same_height():
    plan = decode.make_plan([5, 1, 0, 1, 0, 3], 6, torch.float32)
    assert plan.batches == [(3, 2, 2, 1), (0, 1, 2, 2)]
    assert plan.row_slot == [5, 0, 2, 4, 1, 3]


def test_plan_leaves_crowded_experts_alone_and_bounds_a_batch():
    crowded = decode.make_plan([0] * 5 + [1, 2], 3, torch.bfloat16)
    assert crowded.batches == [(0, 1, 1, 5), (1, 1, 2, 1)]
    many = decode.make_plan(list(range(20)), 20, torch.bfloat16)
    assert many.batches == [(0, 1, 8, 1), (8, 1, 8, 1), (16, 1, 4, 1)]
    assert decode.make_plan([3, 2], 5, torch.float16).batches == [(3, 1, 1, 1), (2, 1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_and_without_gradients(dtype):
    case = make_case(dtype, T=20, H=35, I=19, E=9, K=4)
    assert torch.equal(fused_moe(*case), fused_moe(*[t.detach() for t in case]))


def test_a_bad_token_stays_its_own():
    """Padding repeats rows; a NaN in one token must not reach another."""
    x, gate_up, down, ids, weights = (t.detach() for t in make_case(torch.bfloat16, T=5, E=6, K=3))
    clean = fused_moe(x, gate_up, down, ids, weights)
    x[0] = float("nan")
    dirty = fused_moe(x, gate_up, down, ids, weights)
    assert torch.equal(dirty[1:], clean[1:])


def test_more_slots_take_another_path(plans):
    case = [t.detach() for t in make_case(torch.float32, T=decode.MAX_ROWS // 3 + 1)]
    fused_moe(*case)
    assert plans == []
