"""Stacks in 4 bits, read back, and whole layers on them: what the tests of the CPU and Triton paths share."""

import torch
from epilogue_cases import NAMES, biased_case
from moe_cases import assert_close

from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
from deepseek_kernels.fused_moe import fused_moe_reference
from deepseek_kernels.fused_moe_four_bit import fused_moe_four_bit


def pack(stack, fmt):
    codes, scales = fmt.empty(tuple(stack.shape), stack.dtype, stack.device)
    for expert in range(stack.shape[0]):
        fmt.quantize_into(stack[expert], codes[expert], scales[expert])
    return PackedMatrices(codes, scales, tuple(stack.shape), fmt, stack.dtype)


def unpacked(packed):
    return torch.stack([packed[expert].clone() for expert in range(packed.shape[0])])


def packed_case(dtype, name, group_size, **shape):
    """x, both stacks in 4 bits, ids, weights and both biases, of which the first is frozen."""
    case = biased_case(dtype, **shape)
    fmt = FourBitFormat.of(4, name, group_size)
    stacks = [pack(case[i].detach(), fmt) for i in (1, 2)]
    return [case[0], *stacks, *case[3:5], *(bias.detach() for bias in case[5:6]), *case[6:]]


def results(case, activation="silu"):
    """Output, and under a fixed random gradient of it those of the input and the router weights."""
    biases = dict(zip(("gate_up_bias", "down_bias"), case[5:], strict=False))
    output = fused_moe_four_bit(*case[:5], activation=activation, **biases)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    return [output.detach(), *torch.autograd.grad(output, (case[0], case[4]), grad)]


def assert_equals_reference(got, case, dtype, activation="silu"):
    """Relative RMS and largest error against the reference in float64 on the weights that the codes stand for."""
    stacks = [unpacked(one) for one in case[1:3]]
    wide = [t.detach().cpu() for t in (case[0], *stacks, *case[3:])]
    x, gate_up, down, ids, weights, *biases = (t.double() if t.is_floating_point() else t for t in wide)
    leaves = (x.requires_grad_(), weights.requires_grad_())
    named = dict(zip(("gate_up_bias", "down_bias"), biases, strict=False))
    output = fused_moe_reference(x, gate_up, down, ids, weights, activation=activation, **named)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(case[0].dtype).double()
    wanted = [output.detach(), *torch.autograd.grad(output, leaves, grad, allow_unused=True)]
    wanted = [torch.zeros_like(one) if w is None else w for w, one in zip(wanted, (output, *leaves), strict=True)]
    for label, one, other in zip((NAMES[0], NAMES[1], NAMES[4]), got, wanted, strict=True):
        assert_close(label, one, other, dtype, slack=4 if dtype == torch.bfloat16 and activation != "silu" else 1)
