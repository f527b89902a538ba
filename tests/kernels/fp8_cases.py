"""Layers for the tests of FP8, and the coarser ways of scaling that those tests must be able to tell apart."""

import torch
import torch.nn.functional as F

from deepseek_kernels.fp8 import FP8, GROUP, quantize_blocks


def float32_scales(x):
    """Groups of 128 in a row, scaled to just 448."""
    groups = F.pad(x.float(), (0, -x.shape[1] % GROUP)).view(x.shape[0], -1, GROUP)
    return groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448, groups


def whole_rows(x):
    """One scale for each row."""
    return x.float().abs().amax(-1, keepdim=True).unsqueeze(-1).clamp(min=1e-12) / 448, x.float().unsqueeze(1)


def whole_tensor(x):
    """One scale for all."""
    return (x.float().abs().amax() / 448).view(1, 1, 1), x.float().unsqueeze(1)


def floor_of_deepgemm(x):
    """Groups of 128 whose largest value counts as 1e-4 at least."""
    scale, groups = float32_scales(x)
    return scale.clamp(min=1e-4 / 448), groups


def rounded(x, scaling):
    """`x` as FP8 with another way of scaling holds it."""
    scale, groups = scaling(x)
    codes = (groups / scale).to(FP8).float() * scale
    return codes.reshape(x.shape[0], -1)[:, : x.shape[1]]


def special_rows():
    """Rows [8, 300] at the edges of what the codes hold."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 300, generator=generator)  # the third group of a row has 44
    x[1] = 0
    x[2] *= 1e-30
    x[3, 7] = 3e38
    x[4] *= torch.logspace(-30, 30, 300)
    x[5, 130:] = 448.0
    x[6, 0] = 449.0  # one step above what fits a scale of 1
    x[7] = torch.linspace(-(2**-9), 2**-9, 300)
    return x


def make_layer(T=96, H=256, I=160, E=4, K=2, *, dtype=torch.float32, unused=0.1, seed=0, device="cpu"):  # noqa: E741
    """x, gate_up, down, ids, weights; I is no multiple of 128."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator)
    gate_up = torch.randn(E, 2 * I, H, generator=generator) / H**0.5
    down = torch.randn(E, H, I, generator=generator) / I**0.5
    ids = torch.randint(0, E, (T, K), generator=generator)
    ids = ids.masked_fill(torch.rand(T, K, generator=generator) < unused, E)
    weights = torch.rand(T, K, generator=generator) + 0.1
    floats = [t.to(device, dtype).requires_grad_() for t in (x, gate_up, down)]
    return [*floats, ids.to(device), weights.to(device).requires_grad_()]


def codes_of(case):
    """A checkpoint's codes of the same weights, and its scales by the names of `fused_moe_fp8`."""
    found = []
    for weights in (case[1], case[2]):
        pairs = [quantize_blocks(matrix.detach()) for matrix in weights]
        found.append([torch.stack([pair[i] for pair in pairs]) for i in range(2)])
    (gate_up, gate_up_scales), (down, down_scales) = found
    return gate_up.contiguous(), down.contiguous(), {"gate_up_scales": gate_up_scales, "down_scales": down_scales}


def gradients(function, case, **settings):
    """Output and the four gradients under a fixed random gradient of the output; zeros for what has none."""
    output = function(*case, **settings)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output))
    return [
        output.detach(),
        *(torch.zeros_like(case[i]) if case[i].grad is None else case[i].grad for i in (0, 1, 2, 4)),
    ]


def decibels(got, wanted):
    """Signal to noise ratio."""
    wanted = wanted.double()
    return (10 * torch.log10(wanted.square().sum() / (got.double() - wanted).square().sum())).item()
