"""The CPU path of `fused_moe` against its reference in float64, and the errors of its arguments."""

import pytest
import torch

from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference

# Relative RMS per tensor. bf16 rounds h, a, y and the output, each 1.6e-3; the gradients pass through a few more.
OUTPUT_RMS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 7e-4, torch.bfloat16: 5e-3}


def make_case(dtype, *, T=7, H=12, I=5, E=6, K=3, unused=True, seed=0):  # noqa: E741
    """Inputs of order one; odd H and I, T below any tile, some slots unused."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator)
    gate_up = torch.randn(E, 2 * I, H, generator=generator) / H**0.5
    down = torch.randn(E, H, I, generator=generator) / I**0.5
    ids = torch.randint(0, E + 1 if unused else E, (T, K), generator=generator)
    weights = torch.rand(T, K, generator=generator) + 0.1
    weights = weights.double() if dtype == torch.float64 else weights
    return [t.to(dtype).requires_grad_() for t in (x, gate_up, down)], ids, weights.requires_grad_()


def relative_rms(got, want):
    return ((got.double() - want).square().mean().sqrt() / want.square().mean().sqrt().clamp_min(1e-30)).item()


def run(function, tensors, ids, weights, grad, **kwargs):
    output = function(*tensors, ids, weights, **kwargs)
    output.backward(grad.to(output.dtype))
    return [output.detach(), *(t.grad for t in (*tensors, weights))]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("dtype", OUTPUT_RMS)
def test_output_and_gradients_equal_the_reference(dtype, activation):
    tensors, ids, weights = make_case(dtype, T=33)
    grad = torch.randn(33, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    wide_weights = weights.detach().double().requires_grad_()
    got = run(fused_moe, tensors, ids, weights, grad, activation=activation)
    want = run(fused_moe_reference, wide, ids, wide_weights, grad.double(), activation=activation)
    for one, other in zip(got, want, strict=True):
        assert relative_rms(one, other) < OUTPUT_RMS[dtype]
