"""`fused_moe` on a CPU: against its reference in float64, what it keeps, how it composes with torch, its errors."""

import pytest
import torch
from moe_cases import assert_equals_reference, gradients, make_case
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from deepseek_kernels.cpu import decode as fused_moe_cpu_decode
from deepseek_kernels.cpu import large_buffers
from deepseek_kernels.cpu import staged as fused_moe_cpu_staged
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fused_moe import fused_moe

PATTERNS = ["some_unused", "empty_experts", "one_expert", "all_unused"]


@pytest.fixture(params=["few", "small", "large"])
def either_path(request, monkeypatch):
    """Few slots take the decoding path, small batches the staged one, large ones the loop; run all at small shapes."""
    if request.param != "few":
        monkeypatch.setattr(fused_moe_cpu_decode, "MAX_ROWS", -1)
    if request.param == "large":
        monkeypatch.setattr(fused_moe_cpu_staged, "MAX_BYTES", -1)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(dtype, activation, either_path):
    case = make_case(dtype, T=33)
    assert_equals_reference(gradients(fused_moe, case, activation), case, dtype, activation)


@pytest.mark.parametrize("T", [0, 1, 7, 64])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_patterns(dtype, pattern, T, either_path):
    case = make_case(dtype, T=T, H=35, I=19, pattern=pattern)
    assert_equals_reference(gradients(fused_moe, case), case, dtype)


def test_every_expert_for_every_token():
    case = make_case(torch.float32, T=7, E=5, K=5, pattern="every_expert")
    assert_equals_reference(gradients(fused_moe, case), case, torch.float32)


def test_int32_indices_and_a_strided_input():
    x, gate_up, down, ids, weights = (t.detach() for t in make_case(torch.float32, T=8))
    wanted = fused_moe(x, gate_up, down, ids, weights)
    got = fused_moe(x.t().contiguous().t(), gate_up, down, ids.int().t().contiguous().t(), weights)
    assert torch.equal(got, wanted)


def test_gradcheck():
    x, gate_up, down, ids, weights = make_case(torch.float64, T=4, H=3, I=2, E=3, K=2)
    for activation in ("silu", "gelu", "gelu_pytorch_tanh"):
        function = lambda *t, a=activation: fused_moe(*t[:3], ids, t[3], activation=a)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, gate_up, down, weights))


def test_repeat_runs_are_bit_equal():
    runs = [gradients(fused_moe, make_case(torch.bfloat16, T=64)) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_dirty_buffers_do_not_show(monkeypatch, either_path):
    def poison(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)

    for owner, name in ((torch, "empty"), (torch.Tensor, "new_empty"), (large_buffers, "empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, original=original, **k: poison(original(*a, **k)))
    for pattern in PATTERNS:
        case = make_case(torch.float32, T=7, pattern=pattern)
        assert_equals_reference(gradients(fused_moe, case), case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kept_for_backward_is_input_preactivation_and_integers(dtype, either_path):
    T, H, I, E, K = 64, 32, 24, 4, 3  # noqa: E741
    case = make_case(dtype, T=T, H=H, I=I, E=E, K=K)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_moe(*case)
    parameters = {case[1].data_ptr(), case[2].data_ptr()}
    activations = [t for t in kept if t.is_floating_point() and t.data_ptr() not in parameters]
    router_weights = [t for t in activations if t.data_ptr() == case[4].data_ptr()]
    assert len(router_weights) == 1
    num_bytes = sum(t.numel() * t.element_size() for t in activations) - router_weights[0].numel() * 4
    # 2H + 4KI bytes per token in bf16.
    assert num_bytes == T * (H + 2 * K * I) * dtype.itemsize
    integers = sum(t.numel() * t.element_size() for t in kept if not t.is_floating_point())
    assert integers <= 4 * (2 * T * K + 2 * (E + 1) + 4 * 16)


def test_nothing_is_kept_without_gradients():
    case = [t.detach() for t in make_case(torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_moe(*case)
    assert kept == []


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (4,), (0, 1, 2), (1, 2, 4)])
def test_only_wanted_gradients_are_computed(frozen, either_path):
    full = gradients(fused_moe, make_case(torch.float32, T=9))
    case = make_case(torch.float32, T=9)
    for i in frozen:
        case[i].requires_grad_(False)
    output = fused_moe(*case)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)))
    for i, wanted in zip((0, 1, 2, 4), full[1:], strict=True):
        assert case[i].grad is None if i in frozen else torch.allclose(case[i].grad, wanted, atol=1e-6)


def test_compiles_as_one_graph():
    case = make_case(torch.float32, T=9)
    compiled = torch.compile(fused_moe, fullgraph=True, backend="aot_eager")
    got = gradients(lambda *t, activation: compiled(*t, activation=activation), case)
    for one, other in zip(got, gradients(fused_moe, make_case(torch.float32, T=9)), strict=True):
        assert torch.equal(one, other)


def test_custom_operator_is_registered_soundly():
    # Every slot used: opcheck compares all elements, and rows of unused slots are never written.
    x, gate_up, down, ids, weights = make_case(torch.float32, T=5, pattern="any")
    operator = torch.ops.deepseek_kernels.fused_moe.default
    bias = torch.randn(gate_up.shape[:2], requires_grad=True)
    for form, added in (("silu", None), (Epilogue(limit=0.7, alpha=1.702, is_interleaved=True).text, bias)):
        torch.library.opcheck(operator, (x, gate_up, down, ids, weights, form, True, added))


@pytest.mark.parametrize("is_training", [True, False])
def test_meta_tensors_give_shapes_and_dtypes(is_training):
    case = [t.detach().to("meta") for t in make_case(torch.bfloat16, T=16)]
    for tensor in (case[0], case[1], case[2], case[4]):
        tensor.requires_grad_(is_training)
    output = fused_moe(*case)
    assert output.is_meta and output.shape == case[0].shape and output.dtype == torch.bfloat16
    if is_training:
        output.sum().backward()
        assert case[1].grad.is_meta and case[1].grad.shape == case[1].shape


def test_autocast():
    case = make_case(torch.float32, T=16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = fused_moe(*case)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert case[1].grad.dtype == torch.float32 and case[1].grad.abs().sum() > 0
    halves = [t.detach().bfloat16().requires_grad_() for t in case[:3]]
    assert torch.equal(output, fused_moe(*halves, case[3], case[4]))


def test_autocast_keeps_no_copy_of_the_weights():
    case = make_case(torch.float32, T=5, H=17, I=5)
    kept, given = [], {case[i].data_ptr() for i in (1, 2, 4)}
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        fused_moe(*case)
    copies = [t.shape for t in kept if t.is_floating_point() and t.data_ptr() not in given and t.dim() == 3]
    assert copies == []


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant):
    def recomputed(*t, activation):
        return checkpoint(fused_moe, *t, use_reentrant=use_reentrant)

    got = gradients(recomputed, make_case(torch.float32, T=9))
    for one, other in zip(got, gradients(fused_moe, make_case(torch.float32, T=9)), strict=True):
        assert torch.equal(one, other)


def test_backward_twice_through_a_retained_graph():
    case = make_case(torch.float32, T=9)
    output = fused_moe(*case).sum()
    output.backward(retain_graph=True)
    once = case[1].grad.clone()
    output.backward()
    assert torch.allclose(case[1].grad, 2 * once)


def test_large_buffers_are_taken_up_again():
    large_buffers.release_idle()
    first = large_buffers.empty(1024, 1024, dtype=torch.float32)
    address, alias = first.data_ptr(), first[3:]
    del first
    assert large_buffers.idle_bytes() == 0, "a view still holds the buffer"
    del alias
    assert large_buffers.idle_bytes() == 4 * 2**20
    assert large_buffers.empty(2**20, dtype=torch.float32).data_ptr() == address


def broken(position, change):
    arguments = [t.detach() for t in make_case(torch.float32)]
    arguments[position] = change(arguments[position])
    return arguments


ERRORS = {
    "x_dims": (0, lambda t: t[0], "hidden_states: got 1 dimensions, expected 2"),
    "x_dtype": (0, lambda t: t.int(), "hidden_states: got dtype torch.int32"),
    "gate_up_shape": (1, lambda t: t[:, :-1], r"gate_up_proj: got shape \(6, 9, 12\), expected \(6, 10, 12\)"),
    "down_shape": (2, lambda t: t[:-1], r"down_proj: got shape \(5, 12, 5\), expected \(6, 12, 5\)"),
    "down_dtype": (2, lambda t: t.bfloat16(), "down_proj: got dtype torch.bfloat16, expected that of hidden_states"),
    "device": (2, lambda t: t.to("meta"), "down_proj: got device meta"),
    "strides": (1, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "gate_up_proj: got strides"),
    "ids_dtype": (3, lambda t: t.float(), "topk_indices: got dtype torch.float32"),
    "ids_negative": (3, lambda t: t - 7, "topk_indices: got -7, expected 0 or more"),
    "ids_tokens": (3, lambda t: t[:-1], "topk_weights: got shape"),
    "no_tensor": (3, lambda t: t.tolist(), "topk_indices: got list, expected a tensor"),
    "weights_dtype": (4, lambda t: t.int(), "topk_weights: got dtype torch.int32, expected a float dtype"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_argument_got_and_wanted(name):
    position, change, message = ERRORS[name]
    with pytest.raises(ValueError, match=message):
        fused_moe(*broken(position, change))


def test_errors_of_sizes():
    x, gate_up, down, ids, weights = (t.detach() for t in make_case(torch.float32))
    with pytest.raises(ValueError, match=r"gate_up_proj: .* at least one expert"):
        fused_moe(x, gate_up[:0], down[:0], ids, weights)
    with pytest.raises(ValueError, match="K from 1 to 64"):
        fused_moe(x, gate_up, down, ids.repeat(1, 22), weights.repeat(1, 22))
    with pytest.raises(ValueError, match="activation: got 'relu2', expected one of silu"):
        fused_moe(x, gate_up, down, ids, weights, activation="relu2")


def test_called_directly_or_as_operators_the_results_are_the_same(either_path):
    """Who watches operators sees them; nobody else pays for them."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    direct = gradients(fused_moe, make_case(torch.float32, T=9))
    with Watch():
        watched = gradients(fused_moe, make_case(torch.float32, T=9))
    assert [name for name in seen if "deepseek" in name] == [
        "deepseek_kernels.fused_moe.default",
        "deepseek_kernels.fused_moe_backward.default",
    ]
    for one, other in zip(direct, watched, strict=True):
        assert torch.equal(one, other)


def test_a_second_derivative_is_refused():
    case = make_case(torch.float32, T=3)
    (grad,) = torch.autograd.grad(fused_moe(*case).square().sum(), case[0], create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()
