"""Layers in FP8 with low-rank factors, and what they have to give: PEFT's fold by slots in float64."""

import torch
from fp8_cases import codes_of, make_layer

from deepseek_kernels import fp8
from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fused_moe_fp8 import fused_moe_fp8
from deepseek_kernels.lora import LoraFactors

NAMES = ("output", "hidden_states", "topk_weights", "gate_up_a", "gate_up_b", "down_a", "down_b")
BOTH = ("gate_up", "down")


def make_fp8_lora_case(*, r=4, which=BOTH, factor_dtype=None, is_loaded=False, activation="silu", **shape):
    """Operands of `fused_moe_fp8` by name; the factors' part is about as large as that of the weights.

    Args:
        r: Rank.
        which: The projections with factors.
        factor_dtype: Of the factors; None for that of x.
        is_loaded: Whether the weights come as a checkpoint's codes.
        activation: Or an `Epilogue`.
        **shape: As for `make_layer`.
    """
    case = make_layer(**shape)
    x, gate_up, down, ids, weights = case
    generator = torch.Generator().manual_seed(7)

    def factors(stack):
        num_experts, height, width = stack.shape
        shapes = ((num_experts * r, width, width**-0.5), (height, r * num_experts, r**-0.5))
        pair = (torch.randn(m, n, generator=generator) * scale for m, n, scale in shapes)
        return LoraFactors(*(t.to(x.device, factor_dtype or x.dtype).requires_grad_() for t in pair), 0.5)

    pair = {f"{name}_lora": factors(stack) for name, stack in zip(BOTH, (gate_up, down), strict=True) if name in which}
    projections, scales = (gate_up.detach(), down.detach()), {}
    if is_loaded:
        *projections, scales = codes_of(case)
    return (
        {"x": x, "projections": projections, "ids": ids, "weights": weights, "activation": activation} | scales | pair
    )


def leaves_of(case):
    factors = [case.get(f"{name}_lora") for name in BOTH]
    return [case["x"], case["weights"], *(t for one in factors if one is not None for t in (one.a, one.b))]


def names_of(case):
    return [name for name in NAMES if name in NAMES[:3] or f"{name[:-2]}_lora" in case]


def gradient_of(case):
    x = case["x"]
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)


def run(case):
    settings = {name: one for name, one in case.items() if name not in ("x", "projections", "ids", "weights")}
    return fused_moe_fp8(case["x"], *case["projections"], case["ids"], case["weights"], **settings)


def step(case):
    """The output and the gradients of input, router weights and every factor."""
    output = run(case)
    return [output.detach(), *torch.autograd.grad(output, leaves_of(case), gradient_of(case))]


def folded_delta(stack, factors, dtype):
    """What PEFT adds to a weight (``peft.tuners.lora.layer.ParamWrapper``), in float64; factors rounded."""
    num_experts, height, width = stack.shape
    if factors is None:
        return torch.zeros(num_experts, height, width).double()
    a = factors.a.to(dtype).double().reshape(num_experts, -1, width)
    b = factors.b.to(dtype).double().reshape(height, -1, num_experts).permute(2, 0, 1)
    return factors.scaling * (b @ a)


def _rows(x):
    return fp8.dequantize(*fp8.quantize_rows(x.float().unsqueeze(0)), (1, 128))[0].double()


def _blocks(matrix):
    return fp8.dequantize(*fp8.quantize_blocks(matrix), (128, 128)).double()


def reference(case):
    """What `step` has to give: dequantized weights and PEFT's fold, slot by slot in float64.

    Activations and gradients meet the weights as the codes that FP8 makes of them, the fold as they are.
    """
    gate_up, down = case["projections"]
    if gate_up.dtype == fp8.FP8:
        W1, W2 = (
            torch.stack([fp8.dequantize(m, s, (128, 128)).double() for m, s in zip(stack, case[name], strict=True)])
            for stack, name in ((gate_up, "gate_up_scales"), (down, "down_scales"))
        )
    else:
        W1 = torch.stack([torch.cat([_blocks(half) for half in matrix.chunk(2)]) for matrix in gate_up])
        W2 = torch.stack([_blocks(matrix) for matrix in down])
    pairs = [case.get(f"{name}_lora") for name in BOTH]
    D1, D2 = (folded_delta(stack, one, case["x"].dtype) for stack, one in zip((W1, W2), pairs, strict=True))
    x, ids, weights, grad = case["x"].detach(), case["ids"], case["weights"].detach(), gradient_of(case)
    text = case["activation"]
    epilogue, dtype = (text if isinstance(text, Epilogue) else Epilogue(text)), x.dtype
    output, grad_x = torch.zeros(x.shape).double(), torch.zeros(x.shape).double()
    grad_1, grad_2, grad_w = torch.zeros_like(W1), torch.zeros_like(W2), torch.zeros(ids.shape).double()
    with torch.no_grad():
        for t, k in torch.cartesian_prod(torch.arange(ids.shape[0]), torch.arange(ids.shape[1])).tolist():
            e, s = int(ids[t, k]), weights[t, k].double()
            if e >= W1.shape[0]:
                continue
            h = (W1[e] @ _rows(x[t]) + D1[e] @ x[t].double()).to(dtype).double().requires_grad_()
            with torch.enable_grad():
                a = epilogue.apply(h.unsqueeze(0))[0]
            plain = a.detach().to(dtype).double()
            output[t] += s * (W2[e] @ _rows(a.detach()) + D2[e] @ plain).to(dtype).double()
            grad_a = _rows(grad[t]) @ W2[e] + grad[t].double() @ D2[e]
            grad_w[t, k] = grad_a @ a.detach()
            (grad_h,) = torch.autograd.grad(a, h, s * grad_a)
            grad_h = grad_h.to(dtype).double()
            grad_1[e] += torch.outer(grad_h, x[t].double())
            grad_2[e] += torch.outer(grad[t].double(), s * plain)
            grad_x[t] += torch.cat([_rows(half) for half in grad_h.chunk(2)]) @ W1[e] + grad_h @ D1[e]
    found = [output, grad_x, grad_w]
    for delta, one, gradient in ((D1, pairs[0], grad_1), (D2, pairs[1], grad_2)):
        if one is not None:
            found += torch.autograd.grad(delta, (one.a, one.b), gradient)
    return found


def relative_errors(got, wanted):
    """By name the norm of the difference over the norm."""
    pairs = zip(got, wanted, strict=True)
    return [(float((one.double() - other).norm()), float(other.double().norm())) for one, other in pairs]
