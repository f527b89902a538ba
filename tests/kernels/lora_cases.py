"""Layers with low-rank factors and what they have to give: shared by the tests of the Triton path."""

import torch
from moe_cases import make_ids

from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.expert_loop import expert_loop
from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference
from deepseek_kernels.lora import LoraFactors

NAMES = ("output", "hidden_states", "topk_weights", "gate_up_a", "gate_up_b", "down_a", "down_b")
BOTH, GATE_UP, DOWN = ("gate_up", "down"), ("gate_up",), ("down",)


def make_lora_case(
    dtype,
    *,
    T=7,
    H=35,
    I=19,  # noqa: E741
    E=5,
    K=3,
    r=4,
    which=BOTH,
    pattern="some_unused",
    factor_dtype=None,
    has_bias=False,
    activation="silu",
    device="cpu",
    seed=0,
):
    """Operands of order one; the factors' part is about as large as that of the weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0, to=dtype):
        return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=to)

    def factors(inputs, outputs):
        to = factor_dtype or dtype
        a, b = normal(E * r, inputs, scale=inputs**-0.5, to=to), normal(outputs, r * E, scale=r**-0.5, to=to)
        return LoraFactors(a.requires_grad_(), b.requires_grad_(), 0.5)

    weights = torch.rand(T, K, generator=generator).to(device) + 0.1
    return {
        "x": normal(T, H).requires_grad_(),
        "gate_up_proj": normal(E, 2 * I, H, scale=H**-0.5),
        "down_proj": normal(E, H, I, scale=I**-0.5),
        "ids": make_ids(pattern, T, K, E, generator).long().to(device),
        "weights": (weights.double() if dtype == torch.float64 else weights).requires_grad_(),
        "gate_up_lora": factors(H, 2 * I) if "gate_up" in which else None,
        "down_lora": factors(I, H) if "down" in which else None,
        "gate_up_bias": normal(E, 2 * I) if has_bias else None,
        "down_bias": normal(E, H) if has_bias else None,
        "activation": activation,
        "grad": normal(T, H),
    }


def leaves_of(case):
    factors = [case[name] for name in ("gate_up_lora", "down_lora")]
    return [case["x"], case["weights"], *(t for one in factors if one is not None for t in (one.a, one.b))]


def names_of(case):
    return [name for name in NAMES if name in NAMES[:3] or case[f"{name[:-2]}_lora"] is not None]


def run(case):
    operands = [case[name] for name in ("x", "gate_up_proj", "down_proj", "ids", "weights")]
    names = ("activation", "gate_up_bias", "down_bias", "gate_up_lora", "down_lora")
    return fused_moe(*operands, max_rows=case.get("max_rows"), **{name: case[name] for name in names})


def step(case):
    """The output and the gradients of input, router weights and every factor."""
    output = run(case)
    return [output.detach(), *torch.autograd.grad(output, leaves_of(case), case["grad"].to(output.dtype))]


def _folded(weight, factors):
    """What PEFT puts in the place of a weight (``peft.tuners.lora.layer.ParamWrapper``), in the weight's dtype."""
    if factors is None:
        return weight
    a = factors.a.reshape(weight.shape[0], -1, factors.a.shape[-1]).to(weight.dtype)
    b = factors.b.reshape(factors.b.shape[0], -1, weight.shape[0]).permute(2, 0, 1).to(weight.dtype)
    return torch.baddbmm(weight, b, a, alpha=factors.scaling)


def _widened(case):
    """The same numbers in float64 on the CPU, differentiable anew; factors as the operator rounds them."""

    def widen(one):
        if isinstance(one, LoraFactors):
            rounded = (t.detach().to(case["x"].dtype).requires_grad_() for t in (one.a, one.b))
            return LoraFactors(*(widen(t) for t in rounded), one.scaling)
        if not isinstance(one, torch.Tensor) or not one.is_floating_point():
            return one.cpu() if isinstance(one, torch.Tensor) else one
        return one.detach().cpu().double().requires_grad_(one.requires_grad)

    return {name: widen(one) for name, one in case.items()}


def reference(case):
    """What `step` has to give: folded weights through the plain loop over slots, in float64, by autograd."""
    wide = _widened(case)
    projections = [_folded(wide[f"{name}_proj"], wide[f"{name}_lora"]) for name in BOTH]
    biases = {name: wide[name] for name in ("gate_up_bias", "down_bias")}
    output = fused_moe_reference(
        wide["x"], *projections, wide["ids"], wide["weights"], activation=case["activation"], **biases
    )
    grads = torch.autograd.grad(output, leaves_of(wide), wide["grad"], allow_unused=True)
    pairs = zip(leaves_of(wide), grads, strict=True)
    return [output.detach(), *(torch.zeros_like(leaf) if grad is None else grad for leaf, grad in pairs)]


def loop_reference(case):
    """The same at sizes of production: the loop over experts where the tensors are, the factors by the chain rule."""
    assert Epilogue.read(case["activation"]).is_plain and case["gate_up_bias"] is None
    pairs = {name: case[f"{name}_lora"] for name in BOTH}
    folded = [_folded(case[f"{name}_proj"].double(), pairs[name]).detach() for name in BOTH]
    operands = (case["x"].detach(), *folded, case["ids"], case["weights"].detach())
    output, grad_x, grad_gate_up, grad_down, grad_weights = expert_loop(
        *operands, grad_output=case["grad"], dtype=torch.float64
    )
    wanted = [output, grad_x, grad_weights]
    for name, grad in zip(BOTH, (grad_gate_up, grad_down), strict=True):
        if pairs[name] is not None:
            leaves = [pairs[name].a, pairs[name].b]
            delta = _folded(torch.zeros_like(grad), pairs[name])
            wanted += torch.autograd.grad(delta, leaves, grad)
    return wanted
