"""The whole layer by Triton kernels: values, what it keeps, how it composes with torch.

Like ``test_triton_kernels.py`` these run on a GPU, or in a process started with TRITON_INTERPRET=1, which
``test_in_interpreter.py`` starts. H and I straddle tiles of 16.
"""

import os
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from moe_cases import also, assert_equals_reference, gradients, make_case
from torch.utils.checkpoint import checkpoint

from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import experts as fused_moe_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = ["some_unused", "empty_experts", "one_expert", "all_unused"]
ODD = {"H": 35, "I": 19}
pytestmark = pytest.mark.usefixtures("guarded_buffers")


def case_of(dtype, **shape):
    return make_case(dtype, device=DEVICE, **shape)


@pytest.mark.parametrize("T", [0, 1, 7])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_routing_patterns(pattern, T):
    case = case_of(torch.float64, T=T, H=19, I=17, E=4, pattern=pattern)
    assert_equals_reference(gradients(fused_moe, case), case, torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("T", [0, 1, 7, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_routing_patterns_in_every_dtype(dtype, pattern, T):
    case = case_of(dtype, T=T, **ODD, pattern=pattern)
    assert_equals_reference(gradients(fused_moe, case), case, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *also(torch.float32, torch.float16)])
def test_dtypes(dtype):
    case = case_of(dtype, T=7, **ODD)
    assert_equals_reference(gradients(fused_moe, case), case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["some_unused", *also("one_expert")])
def test_sixty_four_tokens(pattern):
    case = case_of(torch.float32, T=64, H=17, I=9, pattern=pattern)
    assert_equals_reference(gradients(fused_moe, case), case, torch.float32)


def test_every_expert_for_every_token():
    case = case_of(torch.float32, T=7, H=16, I=16, E=5, K=5, pattern="every_expert")
    assert_equals_reference(gradients(fused_moe, case), case, torch.float32)


@pytest.mark.slow
def test_sixty_four_slots_a_token():
    case = case_of(torch.float32, T=2, H=5, I=3, E=4, K=64)
    assert_equals_reference(gradients(fused_moe, case), case, torch.float32)


@pytest.mark.parametrize("activation", ["gelu", *also("gelu_pytorch_tanh")])
def test_activations(activation):
    case = case_of(torch.bfloat16, T=7, H=19, I=17)
    assert_equals_reference(gradients(fused_moe, case, activation), case, torch.bfloat16, activation)


@pytest.mark.slow
def test_repeat_runs_are_bit_equal():
    for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.bfloat16,):
        runs = [gradients(fused_moe, case_of(dtype, T=9, H=17, I=9)) for _ in range(2)]
        assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("T", [1, 4, 5, *also(40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_pass_is_the_same_with_gradients_and_without(dtype, T):
    """PPO's old log-probabilities come from the one, the update's from the other; their first ratio has to be 1."""
    case = case_of(dtype, T=T, H=24, I=20)
    with torch.no_grad():
        alone = fused_moe(*case)
    assert torch.equal(fused_moe(*case).detach(), alone)


def test_a_call_after_tf32_was_set_by_the_newer_interface():
    """torch raises where its older interface is read then; ``TrainingArguments(tf32=True)`` sets the newer one."""
    try:
        torch.backends.fp32_precision = "tf32"
        for dtype in (torch.bfloat16, torch.float64) if DEVICE == "cuda" else (torch.bfloat16,):
            case = case_of(dtype, T=7, H=19, I=17)
            assert_equals_reference(gradients(fused_moe, case), case, dtype)
    finally:
        torch.backends.fp32_precision = "none"


def test_a_preactivation_is_not_written_where_no_backward_follows():
    case = [t.detach() for t in case_of(torch.float32, T=7, H=17, I=9)]
    output, preactivation, _ = fused_moe_gpu.forward(*case, "silu", False)
    assert preactivation.numel() == 0 and output.isfinite().all()


@pytest.mark.slow
def test_nothing_outside_the_inputs_is_read():
    """Every float input lies between NaNs: a load that its mask does not stop would bring one in."""

    def between_nans(tensor):
        if not tensor.is_floating_point():
            return tensor
        whole = tensor.new_full((tensor.numel() + 2048,), float("nan"))
        inner = whole[1024:-1024].view(tensor.shape)
        return inner.copy_(tensor.detach()).detach().requires_grad_()

    case = case_of(torch.float32, T=7, **ODD)
    fenced = [between_nans(t) for t in case]
    for one, other in zip(gradients(fused_moe, case), gradients(fused_moe, fenced), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_for_backward_is_input_preactivation_and_integers(dtype):
    T, H, I, E, K = 8, 16, 8, 4, 3  # noqa: E741
    case = case_of(dtype, T=T, H=H, I=I, E=E, K=K)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_moe(*case)
    given = {case[i].data_ptr() for i in (1, 2, 4)}
    activations = [t for t in kept if t.is_floating_point() and t.data_ptr() not in given]
    # 2H + 4KI bytes per token in bf16.
    assert sum(t.numel() * t.element_size() for t in activations) == T * (H + 2 * K * I) * dtype.itemsize
    integers = sum(t.numel() * t.element_size() for t in kept if not t.is_floating_point())
    assert integers <= 4 * (2 * T * K + 2 * (E + 1) + 4 * 16)


@pytest.mark.parametrize("frozen", [(1, 2), (0, 1, 2), *also((0,), (4,), (1, 2, 4))])
def test_only_wanted_gradients_are_computed(frozen):
    shape = {"T": 5, "H": 17, "I": 5}
    full = gradients(fused_moe, case_of(torch.float32, **shape))
    case = case_of(torch.float32, **shape)
    for i in frozen:
        case[i].requires_grad_(False)
    got = gradients(fused_moe, case)
    for i, one, other in zip((0, 1, 2, 4), got[1:], full[1:], strict=True):
        if i in frozen:
            assert case[i].grad is None
        else:
            assert torch.equal(one, other)


@pytest.mark.slow
def test_compiles_as_one_graph(monkeypatch):
    monkeypatch.undo()  # fake tensors are made by torch.empty, too
    shape = {"T": 5, "H": 17, "I": 5}
    compiled = torch.compile(fused_moe, fullgraph=True, backend="aot_eager")
    got = gradients(lambda *t, activation: compiled(*t, activation=activation), case_of(torch.float32, **shape))
    for one, other in zip(got, gradients(fused_moe, case_of(torch.float32, **shape)), strict=True):
        assert torch.equal(one, other)


def test_autocast():
    case = case_of(torch.float32, T=5, H=17, I=5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        output = fused_moe(*case)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert all(case[i].grad.dtype == torch.float32 and case[i].grad.abs().sum() > 0 for i in (0, 1, 2, 4))
    halves = [t.detach().bfloat16().requires_grad_() for t in case[:3]]
    assert torch.equal(output, fused_moe(*halves, *case[3:]))


def test_autocast_keeps_no_copy_of_the_weights():
    case = case_of(torch.float32, T=5, H=17, I=5)
    kept, given = [], {case[i].data_ptr() for i in (1, 2, 4)}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast(DEVICE, dtype=torch.bfloat16),
    ):
        fused_moe(*case)
    copies = [t.shape for t in kept if t.is_floating_point() and t.data_ptr() not in given and t.dim() == 3]
    assert copies == []


@pytest.mark.parametrize("use_reentrant", [False, *also(True)])
def test_activation_checkpointing(use_reentrant):
    def recomputed(*t, activation):
        return checkpoint(fused_moe, *t, use_reentrant=use_reentrant)

    shape = {"T": 5, "H": 17, "I": 5}
    got = gradients(recomputed, case_of(torch.float32, **shape))
    for one, other in zip(got, gradients(fused_moe, case_of(torch.float32, **shape)), strict=True):
        assert torch.equal(one, other)


def gradcheck(activation="silu", **shape):
    x, gate_up, down, ids, weights = case_of(torch.float64, **shape)
    function = lambda *t: fused_moe(*t[:3], ids, t[3], activation=activation)  # noqa: E731
    return torch.autograd.gradcheck(function, (x, gate_up, down, weights))


@pytest.mark.parametrize("activation", also("silu"))
def test_gradcheck(activation):
    assert gradcheck(activation, T=2, H=2, I=1, E=2, K=2)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_gradcheck_larger(activation):
    assert gradcheck(activation, T=4, H=3, I=2, E=3, K=2)


@pytest.mark.parametrize("name", ["test_triton_layer", "test_four_bit_kernels"])
def test_a_device_takes_the_values_that_the_interpreter_takes(name, monkeypatch):
    """Nothing but a device runs the values of `also` as they are there."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    def values_by_test(has_gpu):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        tests = runpy.run_path(str(Path(__file__).with_name(f"{name}.py")))
        marks = [(test, mark) for test in tests for mark in getattr(tests[test], "pytestmark", ())]
        return [(test, mark.args[0], list(map(bare, mark.args[1]))) for test, mark in marks if mark.args]

    def bare(value):  # of `pytest.param` what a test gets
        return value.values if hasattr(value, "marks") else (value,)

    on_device = values_by_test(True)
    assert len(on_device) >= 5 and on_device == values_by_test(False)
