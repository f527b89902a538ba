"""LoRA inside `fused_moe` against weights with the factors folded in, as PEFT folds them, and against fp64."""

import pytest
import torch

from deepseek_kernels.cpu import decode, staged
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.lora import LoraFactors

# T, H, I, E, K, r: a handful of rows; the staged path, with sizes that torch's grouped product takes and with
# odd ones; many rows per expert; the loop over experts.
SHAPES = {
    "few": (7, 35, 19, 6, 3, 4),
    "grouped": (90, 32, 24, 16, 4, 8),
    "odd": (90, 35, 19, 16, 4, 3),
    "one expert": (20, 16, 8, 1, 1, 2),
    "many": (300, 32, 24, 5, 2, 4),
    "loop": (300, 32, 24, 5, 2, 4),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
WHICH = {"both": (True, True), "gate_up": (True, False), "down": (False, True)}


def make(shape, dtype, seed=0, factor_dtype=None):
    num_tokens, hidden, width, num_experts, num_slots, rank = shape
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes, scale=1.0):
        return (torch.randn(*sizes, generator=generator, dtype=torch.float64) * scale).to(dtype)

    def factors(inputs, outputs):
        pair = (randn(num_experts * rank, inputs, scale=0.3), randn(outputs, rank * num_experts, scale=0.3))
        return LoraFactors(*(one.to(factor_dtype or dtype).requires_grad_() for one in pair), scaling=2.0)

    ids = torch.randint(0, num_experts + 1, (num_tokens, num_slots), generator=generator)
    ids[ids == 1] = num_experts  # An expert without rows, and unused slots.
    return {
        "x": randn(num_tokens, hidden).requires_grad_(),
        "gate_up_proj": randn(num_experts, 2 * width, hidden, scale=0.2),
        "down_proj": randn(num_experts, hidden, width, scale=0.2),
        "ids": ids,
        "weights": torch.rand(num_tokens, num_slots, generator=generator).to(dtype).requires_grad_(),
        "gate_up": factors(hidden, 2 * width),
        "down": factors(width, hidden),
        "grad": randn(num_tokens, hidden),
    }


def folded(weight, factors):
    """``peft.tuners.lora.layer.ParamWrapper.get_delta_factors`` and the fold, in the weight's dtype."""
    if factors is None:
        return weight
    num_experts = weight.shape[0]
    a = factors.a.reshape(num_experts, -1, factors.a.shape[-1]).to(weight.dtype)
    b = factors.b.reshape(factors.b.shape[0], -1, num_experts).permute(2, 0, 1).to(weight.dtype)
    return torch.baddbmm(weight, b, a, alpha=factors.scaling)


def results(case, which, *, fold):
    """The output and the gradients of x, the router weights and every factor."""
    pair = [case[name] if wanted else None for name, wanted in zip(("gate_up", "down"), which, strict=True)]
    projections = [case["gate_up_proj"], case["down_proj"]]
    if fold:
        projections = [folded(weight, one) for weight, one in zip(projections, pair, strict=True)]
        arguments = {}
    else:
        arguments = {"gate_up_lora": pair[0], "down_lora": pair[1]}
    output = fused_moe(case["x"], *projections, case["ids"], case["weights"], **arguments)
    leaves = [case["x"], case["weights"], *(t for one in pair if one is not None for t in (one.a, one.b))]
    return [output, *torch.autograd.grad(output, leaves, case["grad"])]


def assert_near(got, expected, tolerance):
    for i, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.shape == other.shape and one.dtype == other.dtype
        error = (one.double() - other.double()).abs().max() / other.double().abs().max()
        assert error <= tolerance, (i, float(error))


@pytest.fixture(params=SHAPES)
def shape(request, monkeypatch):
    if request.param == "loop":
        monkeypatch.setattr(staged, "MAX_BYTES", 0)
    sizes = SHAPES[request.param]
    assert (sizes[0] * sizes[4] <= decode.MAX_ROWS) == (request.param in ("few", "one expert"))
    return sizes


@pytest.mark.parametrize("which", WHICH.values(), ids=WHICH)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_fold_with_all_gradients(shape, dtype, which):
    case = make(shape, dtype)
    assert_near(results(case, which, fold=False), results(case, which, fold=True), TOLERANCE[dtype])


@pytest.mark.parametrize("which", WHICH.values(), ids=WHICH)
def test_fp32_is_near_fp64(shape, which):
    narrow, wide = make(shape, torch.float32), make(shape, torch.float64)
    expected = [one.float() for one in results(wide, which, fold=True)]
    assert_near(results(narrow, which, fold=False), expected, 1e-5)


def test_the_forward_pass_is_the_same_without_gradients(shape):
    case = make(shape, torch.float32)
    with torch.no_grad():
        plain = fused_moe(
            case["x"],
            case["gate_up_proj"],
            case["down_proj"],
            case["ids"],
            case["weights"],
            gate_up_lora=case["gate_up"],
            down_lora=case["down"],
        )
    assert torch.equal(plain, results(case, (True, True), fold=False)[0])


def test_adapters_in_fp32_on_experts_in_bf16():
    """What PEFT makes of a bf16 model: the factors train in fp32, and so are their gradients."""
    case = make(SHAPES["grouped"], torch.bfloat16, factor_dtype=torch.float32)
    got = results(case, (True, True), fold=False)
    assert [one.dtype for one in got] == [torch.bfloat16] * 3 + [torch.float32] * 4
    assert_near(got, results(case, (True, True), fold=True), TOLERANCE[torch.bfloat16])


def test_gradients_by_differences():
    case = make((5, 6, 4, 3, 2, 2), torch.float64)
    leaves = (case["x"], case["weights"], case["gate_up"].a, case["gate_up"].b, case["down"].a, case["down"].b)

    def run(x, weights, a1, b1, a2, b2):
        pair = {"gate_up_lora": LoraFactors(a1, b1, 2.0), "down_lora": LoraFactors(a2, b2, 0.5)}
        return fused_moe(x, case["gate_up_proj"], case["down_proj"], case["ids"], weights, **pair)

    assert torch.autograd.gradcheck(run, leaves)


def test_no_tokens():
    case = make((0, 16, 8, 4, 2, 2), torch.float32)
    got = results(case, (True, True), fold=False)
    assert got[0].shape == (0, 16) and not any(one.any() for one in got[3:])


@pytest.mark.slow
def test_compiled_in_one_graph():
    case = make(SHAPES["grouped"], torch.float32)
    expected = results(case, (True, True), fold=False)
    leaves = [case["x"], case["weights"], case["gate_up"].a, case["gate_up"].b]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x, weights, a, b):
        return fused_moe(
            x, case["gate_up_proj"], case["down_proj"], case["ids"], weights, gate_up_lora=LoraFactors(a, b, 2.0)
        )

    output = run(*leaves)
    got = [output, *torch.autograd.grad(output, leaves, case["grad"])]
    assert_near(got, results(case, (True, False), fold=False), 1e-6)
    assert expected[0].shape == output.shape


def test_what_is_kept_for_the_backward_pass():
    """The rank's share of every row beside what `fused_moe` keeps; no copy of B, nothing of a matrix's size."""
    case, kept = make(SHAPES["grouped"], torch.float32), {}
    owned = {case[name].data_ptr() for name in ("x", "gate_up_proj", "down_proj", "weights")}
    owned |= {t.data_ptr() for name in ("gate_up", "down") for t in (case[name].a, case[name].b)}

    def note(tensor):
        if tensor.data_ptr() not in owned:
            kept[tensor.data_ptr()] = tensor.numel() * (tensor.itemsize if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        results_ = fused_moe(
            case["x"],
            case["gate_up_proj"],
            case["down_proj"],
            case["ids"],
            case["weights"],
            gate_up_lora=case["gate_up"],
            down_lora=case["down"],
        )
    assert results_.requires_grad
    num_tokens, _, width, _, num_slots, rank = SHAPES["grouped"]
    assert sum(kept.values()) == num_tokens * num_slots * (2 * width + 2 * rank) * 4


def test_autocast_casts_inside():
    case = make(SHAPES["grouped"], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(case, (True, True), fold=False)
    assert got[0].dtype == torch.bfloat16 and got[3].dtype == torch.float32
    expected = results(case, (True, True), fold=True)
    assert_near([one.float() for one in got], expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: LoraFactors(f.a[:0], f.b[:, :0]), "gate_up_lora.a: got shape (0, 32), expected (16 * r, 32)"),
        (lambda f: LoraFactors(f.a[1:], f.b), "gate_up_lora.a: got shape (127, 32)"),
        (lambda f: LoraFactors(f.a[:, 1:], f.b), "gate_up_lora.a: got shape (128, 31)"),
        (lambda f: LoraFactors(f.a, f.b.t()), "gate_up_lora.b: got shape (128, 48), expected (48, 128)"),
        (lambda f: LoraFactors(f.a, f.b.int()), "gate_up_lora.b: got torch.int32"),
        (lambda f: LoraFactors(f.a.to("meta"), f.b), "gate_up_lora.a: got torch.float32 on meta"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, message):
    case = make(SHAPES["grouped"], torch.float32)
    case["gate_up"] = change(case["gate_up"])
    with pytest.raises(ValueError) as error:
        results(case, (True, True), fold=False)
    assert str(error.value).startswith(message)


def test_weights_that_train_themselves_are_refused():
    case = make(SHAPES["grouped"], torch.float32)
    case["down_proj"].requires_grad_()
    with pytest.raises(ValueError, match="down_proj: got requires_grad, expected weights and a bias that are frozen"):
        results(case, (True, False), fold=False)
