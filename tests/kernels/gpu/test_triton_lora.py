"""LoRA inside the Triton path against folded weights in float64: all gradients, odd sizes, either projection.

Like ``test_triton_layer.py`` these run on a GPU, or in a process started with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from lora_cases import BOTH, DOWN, GATE_UP, leaves_of, loop_reference, make_lora_case, names_of, reference, run, step
from moe_cases import assert_close

from deepseek_kernels.cpu import experts as experts_cpu
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.expert_loop import TILE_TOLERANCE, largest_tile_error
from deepseek_kernels.gpu import experts
from deepseek_kernels.gpu.tiles import SHIPPED
from deepseek_kernels.lora import LoraFactors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPT_OSS = Epilogue(limit=0.7, alpha=1.702, shift=1.0, is_interleaved=True)
# Beside what `fused_moe` rounds, the rows of both ranks and what flows back into them.
SLACK = 2
pytestmark = pytest.mark.usefixtures("guarded_buffers")


@pytest.fixture(autouse=True)
def no_loop_over_experts(monkeypatch):
    """What the CPU path does must not stand in for the kernels."""

    def refuse(*args, **kwargs):
        raise AssertionError("the CPU path ran")

    for name in ("route", "forward", "backward"):
        monkeypatch.setattr(experts_cpu, name, refuse)


def case_of(dtype, **settings):
    return make_lora_case(dtype, device=DEVICE, **settings)


def assert_right(case):
    for name, got, wanted in zip(names_of(case), step(case), reference(case), strict=True):
        assert_close(name, got, wanted, case["x"].dtype, slack=SLACK)


# Both projections; one alone, with a rank of 1 and biases, clamps and interleaved rows; a rank of more than one block.
QUICK = [
    (torch.float64, {}),
    (torch.float32, {"which": GATE_UP, "r": 1, "has_bias": True, "activation": GPT_OSS, "T": 4}),
    (torch.bfloat16, {"which": DOWN, "r": 20, "T": 3, "factor_dtype": torch.float32}),
]


@pytest.mark.parametrize("dtype,settings", QUICK, ids=["both", "gate_up", "down"])
def test_output_and_every_gradient(dtype, settings):
    assert_right(case_of(dtype, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("which", [BOTH, GATE_UP, DOWN], ids="-".join)
@pytest.mark.parametrize("r", [1, 8, 16, 65])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_dtypes_and_ranks(dtype, r, which):
    assert_right(case_of(dtype, r=r, which=which))


@pytest.mark.slow
@pytest.mark.parametrize("T", [1, 5, 40])
@pytest.mark.parametrize("pattern", ["any", "empty_experts", "one_expert", "all_unused"])
def test_routing_patterns(pattern, T):
    assert_right(case_of(torch.float64, T=T, pattern=pattern, has_bias=True))


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["gelu_pytorch_tanh", GPT_OSS], ids=["gelu", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_epilogues(dtype, activation):
    # h of bf16 within rounding of the limit falls on the other side of it.
    case = case_of(dtype, activation=activation, has_bias=True)
    for name, got, wanted in zip(names_of(case), step(case), reference(case), strict=True):
        assert_close(name, got, wanted, dtype, slack=8 if dtype == torch.bfloat16 else SLACK)


def test_no_tokens():
    output, grad_x, _, *of_factors = step(case_of(torch.float32, T=0, H=16, I=8))
    assert output.shape == grad_x.shape == (0, 16)
    assert len(of_factors) == 4 and not any(one.any() for one in of_factors)


def test_the_forward_pass_is_the_same_without_gradients_and_zeros_add_nothing():
    case = case_of(torch.bfloat16, T=2)
    with torch.no_grad():
        alone = run(case)
    assert torch.equal(run(case).detach(), alone)
    with torch.no_grad():
        for name in ("gate_up_lora", "down_lora"):
            case[name].b.zero_()
        zeros = run(case)
        plain = run({**case, "gate_up_lora": None, "down_lora": None})
    assert_close("output", zeros, plain.double().cpu(), torch.bfloat16)


@pytest.mark.slow
def test_frozen_input_and_router():
    """The first layer of a model: gradients of the factors alone."""
    case = case_of(torch.float64, T=3)
    wanted = step(case)[3:]
    for name in ("x", "weights"):
        case[name] = case[name].detach()
    got = torch.autograd.grad(run(case), leaves_of(case)[2:], case["grad"])
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [[1, 3], [0], [2]], ids=["b_alone", "a_of_gate_up", "a_of_down"])
def test_frozen_factors(trained):
    """Gradients of the others alone, by the same sums."""
    case = case_of(torch.float64, T=2, E=3, H=16, I=8)
    wanted = step(case)[3:]
    factors = [t for name in BOTH for t in (case[f"{name}_lora"].a, case[f"{name}_lora"].b)]
    leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(factors)]
    for i, name in enumerate(BOTH):
        case[f"{name}_lora"] = LoraFactors(*leaves[2 * i : 2 * i + 2], case[f"{name}_lora"].scaling)
    got = torch.autograd.grad(run(case), [leaves[i] for i in trained], case["grad"])
    assert all(torch.equal(one, wanted[i]) for one, i in zip(got, trained, strict=True))


@pytest.mark.slow
def test_factors_that_are_not_contiguous():
    case = case_of(torch.float64, T=3)
    wanted = step(case)
    for name in ("gate_up_lora", "down_lora"):
        one = case[name]
        turned = (t.detach().t().contiguous().t().requires_grad_() for t in (one.a, one.b))
        case[name] = LoraFactors(*turned, one.scaling)
    assert all(torch.equal(one, other) for one, other in zip(step(case), wanted, strict=True))


def test_autocast_casts_inside():
    case = case_of(torch.float32, T=3)
    with torch.autocast(DEVICE, torch.bfloat16):
        output, grad_x, grad_weights, *of_factors = step(case)
    assert output.dtype == torch.bfloat16
    assert all(one.dtype == torch.float32 for one in (grad_x, grad_weights, *of_factors))
    for name, got, wanted in zip(
        names_of(case), (output, grad_x, grad_weights, *of_factors), reference(case), strict=True
    ):
        assert_close(name, got, wanted, torch.bfloat16, slack=3)


@pytest.mark.slow
def test_compiled_in_one_graph(monkeypatch):
    """The operator, its fake kernels and its backward pass."""
    monkeypatch.undo()  # fake tensors are made by torch.empty, too
    case, plain = case_of(torch.float64), case_of(torch.float64)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    output = compiled(case)
    got = [output.detach(), *torch.autograd.grad(output, leaves_of(case), case["grad"])]
    assert all(torch.equal(one, other) for one, other in zip(got, step(plain), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("r", [8, 64])
def test_tiles_of_production(r, monkeypatch):
    """Under the interpreter those of an H100: two experts with a whole tile of rows and a part of one each."""
    if DEVICE == "cpu":
        monkeypatch.setattr(experts, "choose_tiles", lambda *arguments: SHIPPED["sm_90", 0, 0, 2])
    case = case_of(torch.bfloat16, T=140, H=264, I=136, E=2, K=2, r=r, pattern="any")
    for name, got, wanted in zip(names_of(case), step(case), loop_reference(case), strict=True):
        assert largest_tile_error(got, wanted) <= TILE_TOLERANCE[torch.bfloat16], name


@pytest.mark.slow
def test_gradients_by_differences():
    case = case_of(torch.float64, T=3, H=5, I=3, E=3, K=2, r=2)

    def call(x, weights, *factors):
        pairs = {f"{name}_lora": LoraFactors(*factors[2 * i : 2 * i + 2], 0.5) for i, name in enumerate(BOTH)}
        return run({**case, "x": x, "weights": weights, **pairs})

    assert torch.autograd.gradcheck(call, leaves_of(case), fast_mode=True)
