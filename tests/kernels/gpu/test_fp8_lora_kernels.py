"""LoRA over FP8 weights by the Triton kernels against PEFT's fold by slots: all gradients, odd sizes, one projection.

In Triton's interpreter (``test_in_interpreter.py``) or on the GPU where there is one.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from fp8_lora_cases import gradient_of, leaves_of, make_fp8_lora_case, names_of, reference, relative_errors, run, step
from moe_cases import make_ids

from deepseek_kernels.cpu import fp8_experts as fp8_experts_cpu
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.gpu import fp8_experts, fp8_tiles
from deepseek_kernels.lora import LoraFactors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU refuses float32; in the interpreter it shows that nothing but the order of sums differs.
EXACT = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# Relative RMS: a sum in another order may round to another code now and then. bf16 rounds the rows of both ranks too,
# so that the activation takes more other codes, each up to a sixteenth off: float32 is what tells faults from that.
RMS = {torch.float32: 2e-4, torch.bfloat16: 3e-2}
SHAPE = {"T": 7, "H": 140, "I": 136, "E": 3, "device": DEVICE}
CLAMPED = Epilogue(limit=0.7, alpha=1.702, shift=1.0)
slow = pytest.mark.slow
pytestmark = pytest.mark.usefixtures("guarded_buffers")


@pytest.fixture(autouse=True)
def no_loop_over_experts(monkeypatch):
    """What the CPU path does must not stand in for the kernels."""

    def refuse(*args, **kwargs):
        raise AssertionError("the CPU path ran")

    for name in ("forward", "backward"):
        monkeypatch.setattr(fp8_experts_cpu, name, refuse)


def on_cpu(case):
    """The same numbers, leaves of their own."""

    def move(one):
        if isinstance(one, LoraFactors):
            return LoraFactors(move(one.a), move(one.b), one.scaling)
        if isinstance(one, (list, tuple)):
            return [move(item) for item in one]
        return one.detach().cpu().requires_grad_(one.requires_grad) if isinstance(one, torch.Tensor) else one

    return {name: move(one) for name, one in case.items()}


def assert_equals_the_fold(case):
    got, wanted = step(case), reference(on_cpu(case))
    errors = relative_errors([one.cpu() for one in got], wanted)
    for name, one, (error, size) in zip(names_of(case), got, errors, strict=True):
        assert one.isfinite().all() and error <= RMS[case["x"].dtype] * size, f"{name}: {error / max(size, 1e-30):.1e}"


# Both projections over weights; over codes; one alone, of rank 1, clamped; a rank of more than one block.
CASES = {
    "both": {"dtype": EXACT},
    "codes": {"dtype": EXACT, "is_loaded": True, "I": 128},
    "gate_up": {"dtype": EXACT, "which": ("gate_up",), "r": 1, "activation": CLAMPED},
    "down": {"dtype": torch.bfloat16, "which": ("down",), "r": 40, "factor_dtype": torch.float32},
}
QUICK = ("both", "codes")


@pytest.mark.parametrize(
    "settings",
    [pytest.param(case, id=name, marks=() if name in QUICK else slow) for name, case in CASES.items()],
)
def test_output_and_every_gradient(settings):
    assert_equals_the_fold(make_fp8_lora_case(**{**SHAPE, **settings}))


@slow
@pytest.mark.parametrize("which", [("gate_up", "down"), ("gate_up",), ("down",)], ids="-".join)
@pytest.mark.parametrize("r", [1, 8, 16, 65])
@pytest.mark.parametrize("dtype", [EXACT, torch.bfloat16])
@pytest.mark.parametrize("is_loaded", [False, True], ids=["weights", "codes"])
def test_dtypes_and_ranks(is_loaded, dtype, r, which):
    sizes = {"I": 128} if is_loaded else {}
    assert_equals_the_fold(
        make_fp8_lora_case(**{**SHAPE, **sizes}, dtype=dtype, r=r, which=which, is_loaded=is_loaded)
    )


@slow
@pytest.mark.parametrize("T", [1, 40])
@pytest.mark.parametrize("pattern", ["empty_experts", "one_expert", "all_unused"])
def test_routing_patterns(pattern, T):
    case = make_fp8_lora_case(**{**SHAPE, "T": T}, dtype=EXACT)
    case["ids"] = make_ids(pattern, T, 2, 3, torch.Generator().manual_seed(1)).long().to(DEVICE)
    assert_equals_the_fold(case)


@slow
@pytest.mark.parametrize("tiles", ["FEW_ROWS", "SOME_ROWS", "MANY_ROWS"])
def test_production_tiles(tiles, monkeypatch):
    """Of 128 columns gate and up write codes and the activation from one kernel; of 64 the codes take another pass."""
    for module in (fp8_experts, fp8_tiles):
        monkeypatch.setattr(module, "choose_fp8_tiles", lambda *arguments: getattr(fp8_tiles, tiles))
    assert_equals_the_fold(make_fp8_lora_case(**SHAPE, dtype=torch.bfloat16))


@slow
def test_without_gradients_the_same_bits_and_frozen_factors():
    case = make_fp8_lora_case(**SHAPE, dtype=EXACT)
    wanted = step(case)
    with torch.no_grad():
        assert torch.equal(run(case), wanted[0])
    for trained in ([1, 3], [0], [2]):  # both B; A of the first; A of the second
        one = on_cpu(case) if DEVICE == "cpu" else case
        factors = [t for name in ("gate_up_lora", "down_lora") for t in (one[name].a, one[name].b)]
        leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(factors)]
        for i, name in enumerate(("gate_up_lora", "down_lora")):
            one[name] = LoraFactors(*leaves[2 * i : 2 * i + 2], one[name].scaling)
        grads = torch.autograd.grad(run(one), [leaves[i] for i in trained], gradient_of(one))
        assert all(torch.equal(grad, wanted[3 + i]) for grad, i in zip(grads, trained, strict=True))


def test_no_tokens():
    output, *grads = step(make_fp8_lora_case(**{**SHAPE, "T": 0}, dtype=EXACT))
    assert output.shape == (0, 140) and len(grads) == len(leaves_of(make_fp8_lora_case(**SHAPE, dtype=EXACT)))
    assert not any(grad.any() for grad in grads)
