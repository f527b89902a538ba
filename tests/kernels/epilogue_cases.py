"""Epilogues as released models have them, and layers with biases: what the tests of the CPU and Triton paths share."""

import torch
from moe_cases import assert_close, make_case

from deepseek_kernels.epilogue import Epilogue
from deepseek_kernels.fused_moe import fused_moe, fused_moe_reference

# As they stand in released models, but with a limit small enough for a good part of the inputs to reach it.
EPILOGUES = {
    "deepseek_v4": Epilogue(limit=0.7),
    "minimax_m3": Epilogue(limit=0.7, alpha=1.702, shift=1.0),
    "gpt_oss": Epilogue(limit=0.7, alpha=1.702, shift=1.0, is_interleaved=True),
    "interleaved": Epilogue(is_interleaved=True),
    "alpha": Epilogue(alpha=1.702),
    "gelu": Epilogue("gelu_pytorch_tanh", limit=0.5, shift=-0.5),
}
NAMES = ("output", "hidden_states", "gate_up_proj", "down_proj", "topk_weights", "gate_up_bias", "down_bias")


def biased_case(dtype, *, has_bias=True, **shape):
    case = make_case(dtype, **shape)
    generator = torch.Generator().manual_seed(7)
    sizes = (case[1].shape[:2], case[2].shape[:2]) if has_bias else ()
    biases = [torch.randn(size, generator=generator).to(case[1].detach()) for size in sizes]
    return [*case, *(bias.requires_grad_() for bias in biases)]


def gradients(function, case, activation):
    """Output and every gradient under a fixed random gradient of the output."""
    biases = dict(zip(("gate_up_bias", "down_bias"), case[5:], strict=False))
    output = function(*case[:5], activation=activation, **biases)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
    leaves = [case[i] for i in range(len(case)) if i != 3]
    return [output.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def assert_equals_reference(case, activation, dtype):
    wide = [t.detach().cpu().double().requires_grad_() if t.is_floating_point() else t.cpu() for t in case]
    wanted = gradients(fused_moe_reference, wide, activation)
    got = gradients(fused_moe, case, activation)
    for name, one, other in zip(NAMES, got, wanted, strict=False):
        # h of bf16 within rounding of the limit falls on the other side of it.
        assert_close(name, one, other, dtype, slack=4 if dtype == torch.bfloat16 else 1)
