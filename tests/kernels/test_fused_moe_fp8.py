"""The experts in FP8 on a CPU: products of the codes, accuracy against no FP8 at all, planted faults, refusals."""

import pytest
import torch
from fp8_cases import codes_of, decibels, floor_of_deepgemm, gradients, make_layer, rounded, whole_rows, whole_tensor
from moe_cases import make_ids
from torch.utils.checkpoint import checkpoint

from deepseek_kernels import fp8
from deepseek_kernels.cpu import fp8_experts
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference
from deepseek_kernels.fused_moe_fp8 import check_device, fused_moe_fp8

NAMES = ("output", "hidden_states", "gate_up_proj", "down_proj", "topk_weights")
# Relative RMS. bf16 rounds h, y and the result, and both gradients before they are rounded to FP8.
RMS = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def double_rows(x):
    return fp8.dequantize(*fp8.quantize_rows(x), (1, 128)).double()


def double_blocks(weights):
    return fp8.dequantize(*fp8.quantize_blocks(weights), (128, 128)).double()


def reference(x, gate_up, down, ids, weights, grad_output):
    """The same products slot by slot in float64, of operands rounded as the recipe says; output and four gradients."""
    x, gate_up, down, weights = (t.detach() for t in (x, gate_up, down, weights))
    dtype, E = x.dtype, gate_up.shape[0]
    W1 = torch.stack([torch.cat([double_blocks(half) for half in matrix.chunk(2)]) for matrix in gate_up])
    W2 = torch.stack([double_blocks(matrix) for matrix in down])
    x_q, grad_q = double_rows(x), double_rows(grad_output)
    output, grad_x = torch.zeros(x.shape).double(), torch.zeros(x.shape).double()
    grad_1, grad_2, grad_w = torch.zeros_like(W1), torch.zeros_like(W2), torch.zeros(ids.shape).double()
    for t, k in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
        e, s = int(ids[t, k]), weights[t, k].double()
        if e >= E:
            continue
        h = (W1[e] @ x_q[t]).to(dtype).double().requires_grad_()
        gate, up = h.chunk(2)
        a = torch.nn.functional.silu(gate) * up
        output[t] += s * (W2[e] @ double_rows(a.detach().float().unsqueeze(0))[0]).to(dtype).double()
        grad_a = grad_q[t] @ W2[e]
        grad_w[t, k] = grad_a @ a.detach()
        (grad_h,) = torch.autograd.grad(a, h, s * grad_a)
        grad_h = grad_h.to(dtype)
        grad_1[e] += torch.outer(grad_h.double(), x[t].double())
        grad_2[e] += torch.outer(grad_output[t].double(), (s * a.detach()).to(dtype).double())
        halves = [double_rows(half.unsqueeze(0))[0] for half in grad_h.chunk(2)]
        grad_x[t] += torch.cat(halves) @ W1[e]
    return output, grad_x, grad_1, grad_2, grad_w


def assert_equals_reference(case):
    got = gradients(fused_moe_fp8, case)
    grad = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1)).to(got[0])
    dtype = case[0].dtype
    for name, one, other in zip(NAMES, got, reference(*case, grad), strict=True):
        error, size = (one.double() - other).norm(), other.norm()
        assert error <= RMS[dtype] * size, f"{name}: {error / size:.1e}"


@pytest.mark.parametrize("pattern", ["some_unused", "empty_experts", "one_expert", "all_unused"])
@pytest.mark.parametrize("T", [0, 1, 7, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_the_codes(dtype, T, pattern):
    case = make_layer(T=T, dtype=dtype)
    case[3] = make_ids(pattern, T, 2, 4, torch.Generator().manual_seed(T)).long()
    assert_equals_reference(case)


@pytest.mark.parametrize("sizes", [(128, 128), (200, 5), (100, 129)], ids=str)
def test_sizes_off_the_block(sizes):
    H, I = sizes  # noqa: E741
    assert_equals_reference(make_layer(T=7, H=H, I=I))


def in_decibels(dtype):
    """Output and gradients against the layer in float64 without FP8, routing fixed."""
    case = make_layer(T=512, H=512, I=256, E=4, dtype=dtype)
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in case]
    got, wanted = gradients(fused_moe_fp8, case), gradients(fused_moe, wide)
    return {name: decibels(one, other) for name, one, other in zip(NAMES, got, wanted, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accuracy_of_the_whole_layer(dtype):
    """Each product alone is at 28.5 dB; two of them one after the other, with an activation between, are at less."""
    found = in_decibels(dtype)
    assert found["output"] >= 23 and found["hidden_states"] >= 23, found
    # Not rounded to FP8 themselves, but made of an h and a grad_h that come of FP8 products.
    assert found["gate_up_proj"] >= 24 and found["down_proj"] >= 24, found


def test_accuracy_of_one_product():
    generator = torch.Generator().manual_seed(8)
    x, weights = torch.randn(512, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    assert up_product(x, weights, fp8.rounded_rows, fp8.rounded_blocks) <= 10 ** (-27 / 20)


def test_weight_gradients_are_not_rounded_to_fp8():
    """Given the same h and dh, they are as exact as bf16: the last of the two is linear in a alone."""
    case = make_layer(T=256, H=256, I=128, E=2, K=1, dtype=torch.bfloat16, unused=0.0)
    got = gradients(fused_moe_fp8, case)
    grad = torch.randn(got[0].shape, generator=torch.Generator().manual_seed(1)).to(got[0])
    x, gate_up, _, ids, weights = (t.detach() for t in case)
    for expert in range(2):
        tokens = (ids[:, 0] == expert).nonzero()[:, 0]
        h = (fp8.rounded_rows(x[tokens]) @ fp8_experts.Weights(gate_up, gate_up).gate_up_of(expert).T).bfloat16()
        a = Epilogue().apply(h.double()) * weights[tokens].double()
        assert decibels(got[3][expert], grad[tokens].double().T @ a) >= 50


def up_product(x, weights, rows, blocks):
    wanted = x.double() @ weights.double().T
    return ((rows(x) @ blocks(weights).T).double() - wanted).norm() / wanted.norm()


def test_one_channel_of_outliers():
    """Where whole rows, or the tensor, share a scale, everything beside the outlier is lost."""
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(512, 1024, generator=generator), torch.randn(256, 1024, generator=generator)
    x[:, 300] *= 1e5
    weights[:, 300] /= 1e5
    assert up_product(x, weights, fp8.rounded_rows, fp8.rounded_blocks) <= 0.09
    for scaling in (whole_rows, whole_tensor):
        error = up_product(x, weights, lambda t, s=scaling: rounded(t, s), lambda t, s=scaling: rounded(t, s))
        assert error > 0.09, scaling.__name__


@pytest.mark.parametrize("size", ["spread", "tiny"])
def test_gradients_of_every_size(size):
    generator = torch.Generator().manual_seed(5)
    case = make_layer(T=256, H=256, I=128, K=1, unused=0.0)
    scale = torch.logspace(-10, 0, 256).unsqueeze(1) if size == "spread" else torch.tensor(1e-9)
    grad = torch.randn(256, 256, generator=generator) * scale
    wide = [t.detach().double().requires_grad_() if t.is_floating_point() else t for t in case]
    fused_moe_fp8(*case).backward(grad)
    fused_moe(*wide).backward(grad.double())
    # Only what FP8 does to gradients: h is that of FP8 in both.
    errors = (case[0].grad.double() - wide[0].grad).norm(dim=1) / wide[0].grad.norm(dim=1)
    assert errors.median() <= 0.08
    lost = (rounded(grad, floor_of_deepgemm) - grad).norm(dim=1) / grad.norm(dim=1)
    assert lost.median() > 0.1 or size == "spread"


def test_two_runs_and_recomputation_are_bit_equal():
    def recomputed(*t):
        return checkpoint(fused_moe_fp8, *t, use_reentrant=False)

    runs = [
        gradients(function, make_layer(dtype=torch.bfloat16))
        for function in (fused_moe_fp8, fused_moe_fp8, recomputed)
    ]
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


def test_weights_are_rounded_anew_after_an_optimizer_step():
    case = make_layer()
    fused_moe_fp8(*case)
    with torch.no_grad():
        case[1].mul_(1.5)
    assert_equals_reference(case)


def test_epilogue_and_biases():
    case = make_layer(T=33)
    generator = torch.Generator().manual_seed(6)
    settings = {
        "activation": Epilogue(limit=0.7, alpha=1.702, shift=1.0),
        "gate_up_bias": torch.randn(4, 320, generator=generator, requires_grad=True),
        "down_bias": torch.randn(4, 256, generator=generator, requires_grad=True),
    }
    output = fused_moe_fp8(*case, **settings)
    wanted = fused_moe_reference(*case, **settings)
    assert (output - wanted).norm() <= 0.06 * wanted.norm()
    output.sum().backward()
    assert settings["gate_up_bias"].grad.any() and settings["down_bias"].grad.any()


def test_codes_of_a_checkpoint_give_the_same_bits_and_are_frozen():
    case = make_layer(T=33, H=256, I=128)
    wanted = gradients(fused_moe_fp8, case)
    gate_up, down, scales = codes_of(case)
    frozen = [case[0].detach().requires_grad_(), gate_up, down, case[3], case[4].detach().requires_grad_()]
    got = gradients(lambda *t: fused_moe_fp8(*t, **scales), frozen)
    for i in (0, 1, 4):
        assert torch.equal(got[i], wanted[i]), NAMES[i]
    assert gate_up.grad is None and down.grad is None


def test_scales_of_a_checkpoint_need_not_be_powers_of_two():
    case = make_layer(T=33, H=256, I=128)
    gate_up, down, scales = codes_of(case)
    scales["down_scales"] = scales["down_scales"] * 1.3
    got = fused_moe_fp8(case[0], gate_up, down, *case[3:], **scales)
    torch.testing.assert_close(got, 1.3 * fused_moe_fp8(*case), rtol=1e-5, atol=1e-5)


FAULTS = {
    "the scale of the neighboring group": ("rounded_rows", lambda x: fp8.dequantize(
        fp8.quantize_rows(x)[0], fp8.quantize_rows(x)[1].roll(1, 1), (1, 128))),
    "the scale of the neighboring block": ("rounded_blocks", lambda w: fp8.dequantize(
        fp8.quantize_blocks(w)[0], fp8.quantize_blocks(w)[1].roll(1, 1), (128, 128))),
    "float32 scales": ("rounded_rows", lambda x: rounded(x, whole_rows)),
    "no rounding at all": ("rounded_rows", lambda x: x.float()),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    name, wrong = FAULTS[fault]
    monkeypatch.setattr(fp8_experts, name, wrong)
    with pytest.raises(AssertionError):
        assert_equals_reference(make_layer(T=64))


@pytest.mark.parametrize("fault", ["dW x 1.05", "gate's scale for up", "a stale copy of the weights"])
def test_planted_faults_of_the_layer_are_seen(fault, monkeypatch):
    original = fp8_experts.Weights.gate_up_of
    if fault == "dW x 1.05":
        backward = fp8_experts.backward
        monkeypatch.setattr(
            fp8_experts,
            "backward",
            lambda *a, **k: tuple(g * 1.05 if i == 1 else g for i, g in enumerate(backward(*a, **k))),
        )
    elif fault == "gate's scale for up":
        monkeypatch.setattr(
            fp8_experts.Weights,
            "gate_up_of",
            lambda self, e: fp8.rounded_blocks(self.gate_up[e]),  # straddles I = 160
        )
    else:
        seen = {}
        monkeypatch.setattr(fp8_experts.Weights, "gate_up_of", lambda self, e: seen.setdefault(e, original(self, e)))
        fused_moe_fp8(*make_layer(T=64, seed=1))
    case = make_layer(T=64)
    with torch.no_grad():
        case[1][:, 160:] *= 1e-6  # beside the gates' scale nothing would be left of them
    with pytest.raises(AssertionError):
        assert_equals_reference(case)


def test_nan_stays_nan_and_stays_in_its_token():
    case = make_layer(T=9)
    case[3] = torch.zeros_like(case[3])
    with torch.no_grad():
        case[0][4] = float("nan")
        output = fused_moe_fp8(*case)
    assert output[4].isnan().all() and output[:4].isfinite().all() and output[5:].isfinite().all()


def test_kept_for_backward_is_input_preactivation_and_integers():
    case = make_layer(T=8, H=16, I=8, dtype=torch.bfloat16)
    kept, given = [], {case[i].data_ptr() for i in (1, 2, 4)}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fused_moe_fp8(*case)
    activations = [t for t in kept if t.is_floating_point() and t.data_ptr() not in given]
    assert sum(t.numel() * t.element_size() for t in activations) == 8 * (16 + 2 * 2 * 8) * 2


@pytest.mark.parametrize(
    "capability,dtype,message",
    [
        ((8, 0), torch.bfloat16, "on cuda, compute capability 8.0, expected 8.9 or later; use fused_moe"),
        ((9, 0), torch.float32, "on cuda with float32 weights, expected bfloat16; use fused_moe"),
    ],
)
def test_a_gpu_is_refused_in_one_line(capability, dtype, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(ValueError, match=message) as caught:
        check_device(torch.device("cuda"), dtype)
    assert "\n" not in str(caught.value)


def test_a_gpu_with_fp8_products_and_two_bytes_an_element_is_let_through(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for dtype in (torch.bfloat16, torch.float16):
        check_device(torch.device("cuda"), dtype)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with pytest.raises(ValueError, match="on cuda of AMD, whose FP8 is another, expected cpu, or an NVIDIA GPU"):
        check_device(torch.device("cuda"), torch.bfloat16)
    with pytest.raises(ValueError, match="on mps, expected cpu"):
        monkeypatch.setattr(torch.version, "hip", None)
        check_device(torch.device("mps"), torch.bfloat16)


def test_what_does_not_fit_is_refused():
    case = make_layer(T=4, H=256, I=128)
    gate_up, down, scales = codes_of(case)
    x, ids, weights = case[0], case[3], case[4]
    for wrong, message in (
        ({}, "gate_up_scales: got FP8 codes without scales"),
        ({**scales, "down_scales": None}, "down_scales: got FP8 codes without scales"),
        (
            {**scales, "down_scales": scales["down_scales"][:, :1]},
            r"down_scales: got shape \(4, 1, 1\), expected \(4, 2, 1\)",
        ),
        ({**scales, "block": (128, 0)}, r"block: got \(128, 0\)"),
        ({**scales, "activation": Epilogue(is_interleaved=True)}, "is_interleaved: got True with FP8"),
    ):
        with pytest.raises(ValueError, match=message):
            fused_moe_fp8(x, gate_up, down, ids, weights, **wrong)
    with pytest.raises(ValueError, match=r"gate_up_scales: got torch\.float32 with scales"):
        fused_moe_fp8(*case, **scales)
    with pytest.raises(ValueError, match=r"hidden_states: got dtype torch\.float64"):
        fused_moe_fp8(x.double(), case[1].double(), case[2].double(), ids, weights)
