"""The layer at 200 random shapes, forward and backward, against float64.

Plain pytest fuzzes the CPU path; in a process started with TRITON_INTERPRET=1 (``test_in_interpreter.py`` starts it),
or on a GPU, the same cases run through the Triton kernels.
"""

import pytest
import torch
from moe_cases import NAMES, assert_close, in_float64, make_case

from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
