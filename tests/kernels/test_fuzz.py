"""The layer and the router at 200 random shapes each, forward and backward, against float64.

Plain pytest fuzzes the CPU path; in a process started with TRITON_INTERPRET=1 (``test_in_interpreter.py`` starts it),
or on a GPU, the same cases run through the Triton kernels.
"""

import os

import pytest
import torch
from moe_cases import NAMES, assert_close, in_float64, make_case

from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS_TRITON = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
PATTERNS = ("any", "some_unused", "empty_experts", "one_expert", "all_unused", "skewed", "every_expert")
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
LEAVES = (0, 1, 2, 4)
# A handful of rows may all have gates where the activation multiplies a rounding error by three.
SLACK = 2
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("guarded_buffers")]


class Dice:
    """Draws from a seed."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def between(self, low, high):
        return int(torch.randint(low, high + 1, (1,), generator=self.generator))

    def pick(self, options):
        return options[self.between(0, len(options) - 1)]


def draw_layer(seed):
    """A case, its activation and which of its leaves are frozen."""
    dice, dtype = Dice(1000 + seed), DTYPES[seed % 4]
    pattern, E = dice.pick(PATTERNS), dice.pick((dice.between(1, 9), dice.between(10, 40)))
    K = E if pattern == "every_expert" else dice.between(1, min(E, 8))
    T = dice.pick((dice.between(0, 4), dice.between(5, 40), 64)) if E < 10 else dice.between(0, 8)
    case = make_case(
        dtype, T=T, H=dice.between(1, 50), I=dice.between(1, 50), E=E, K=K, pattern=pattern, seed=seed, device=DEVICE
    )
    if dice.between(0, 2) == 0:
        case[3] = case[3].int()
    if dice.between(0, 2) == 0:
        case[4] = case[4].detach().to(dtype).requires_grad_()
    frozen = [i for i in LEAVES if dice.between(0, 3) == 0]
    return case, dtype, dice.pick(ACTIVATIONS), frozen


@pytest.mark.parametrize("seed", range(200))
def test_layer(seed):
    case, dtype, activation, frozen = draw_layer(seed)
    exact = in_float64(case)
    for i in frozen:
        case[i].requires_grad_(False)
    output, wanted = fused_moe(*case, activation=activation), fused_moe_reference(*exact, activation=activation)
    assert_close("output", output, wanted, dtype, SLACK)
    with torch.no_grad():  # no backward pass: other kernels for few tokens, no pre-activation
        assert_close("output alone", fused_moe(*case, activation=activation), wanted, dtype, SLACK)
    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    wanted.backward(grad.double())
    if output.requires_grad:
        output.backward(grad.to(DEVICE))
    for name, i in zip(NAMES[1:], LEAVES, strict=True):
        if i in frozen:
            assert case[i].grad is None
            continue
        exact_grad = torch.zeros_like(exact[i]) if exact[i].grad is None else exact[i].grad
        # The router weights' gradient is rounded to their own dtype.
        assert_close(name, case[i].grad, exact_grad, dtype, SLACK)


@pytest.mark.skipif(not RUNS_TRITON, reason="on a CPU the router is its own reference")
@pytest.mark.parametrize("seed", range(200))
def test_router(seed):
    from deepseek_kernels.gpu.router import fused_router, fused_router_reference

    dice = Dice(5000 + seed)
    num_groups, per_group, T = dice.between(1, 6), dice.between(1, 12), dice.between(0, 9)
    E, topk_groups = num_groups * per_group, dice.between(1, num_groups)
    top_k = dice.between(1, min(64, topk_groups * per_group))
    min_k = dice.pick((top_k, dice.between(1, top_k)))
    logits = 3 * torch.randn(T, E, dtype=torch.float64, generator=dice.generator)
    bias = torch.randn(E, dtype=torch.float64, generator=dice.generator) / 3
    share = torch.rand(1, dtype=torch.float64, generator=dice.generator) / 2
    scoring, normalize, scale = dice.pick(("sigmoid", "softmax")), bool(dice.between(0, 1)), dice.pick((1.0, 2.5))
    own, plain = (logits.to(device).requires_grad_() for device in (DEVICE, "cpu"))
    indices, weights = fused_router(
        own,
        top_k=top_k,
        bias=bias.to(DEVICE),
        num_groups=num_groups,
        topk_groups=topk_groups,
        scoring=scoring,
        normalize=normalize,
        scale=scale,
        min_k=min_k,
        unused_share=share.to(DEVICE),
    )
    wanted_indices, wanted = fused_router_reference(
        plain, bias, share, top_k, min_k, num_groups, topk_groups, scoring, normalize, scale
    )
    assert torch.equal(indices.cpu(), wanted_indices)
    torch.testing.assert_close(weights.cpu(), wanted, rtol=1e-10, atol=1e-12)
    grad = torch.randn(wanted.shape, dtype=torch.float64, generator=dice.generator)
    wanted.backward(grad)
    weights.backward(grad.to(DEVICE))
    torch.testing.assert_close(own.grad.cpu(), plain.grad, rtol=1e-10, atol=1e-12)
