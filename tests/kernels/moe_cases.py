"""Routing patterns and tolerances shared by the tests of the kernels, of the CPU path and of the benchmark."""

import pytest
import torch

from deepseek_kernels.expert_loop import TILE_TOLERANCE, expert_loop, largest_tile_error
from deepseek_kernels.fused_moe import fused_moe_reference

# Relative RMS per tensor. bf16 rounds h, a, y and the result, each by 1.6e-3 of its size; the gradients pass through
# one or two more. fp32 sums at most a few hundred products.
RMS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6e-3}
NAMES = ("output", "hidden_states", "gate_up_proj", "down_proj", "topk_weights")


def runs_descriptors():
    """Whether descriptors run here: in the interpreter, and on a GPU with a copy engine."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9


def also(*values):
    """More values of a parameter; the interpreter, which takes seconds for each, has them in the slow run only."""
    marks = () if torch.cuda.is_available() else (pytest.mark.slow,)
    return [pytest.param(value, marks=marks) for value in values]


def make_ids(pattern, T, K, E, generator):
    """Expert of each slot; E means unused."""
    if pattern == "one_expert":
        return torch.full((T, K), min(2, E - 1))
    if pattern == "all_unused":
        return torch.full((T, K), E)
    if pattern == "every_expert":  # K = E
        return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]) if T else torch.empty(0, K)
    ids = torch.randint(0, E, (T, K), generator=generator)
    if pattern == "skewed":  # the square of a uniform number: half of the slots take a quarter of the experts
        return (E * torch.rand(T, K, generator=generator).square()).long()
    if pattern == "empty_experts":
        return ids // 2 * 2  # odd experts get nothing
    if pattern == "some_unused":
        unused = torch.rand(T, K, generator=generator) < 0.4
        return ids.masked_fill(unused, E).where(torch.rand(T, K, generator=generator) < 0.9, E + 7)
    return ids


def make_case(dtype, *, T=7, H=12, I=5, E=6, K=3, pattern="some_unused", seed=0, device="cpu"):  # noqa: E741
    """Leaf tensors x, gate_up, down, ids, weights: inputs of order one."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator)
    gate_up = torch.randn(E, 2 * I, H, generator=generator) / H**0.5
    down = torch.randn(E, H, I, generator=generator) / I**0.5
    ids = make_ids(pattern, T, K, E, generator).long()
    weights = torch.rand(T, K, generator=generator) + 0.1
    weights = weights.double() if dtype == torch.float64 else weights
    floats = [t.to(device=device, dtype=dtype).requires_grad_() for t in (x, gate_up, down)]
    return [*floats, ids.to(device), weights.to(device).requires_grad_()]


def gradients(function, case, activation="silu"):
    """Output and the four gradients under a fixed random gradient of the output."""
    output = function(*case, activation=activation)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    if output.requires_grad:
        output.backward(grad)
    leaves = [case[i] for i in (0, 1, 2, 4)]
    # The reference touches no weight of an expert without tokens.
    return [output.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)]


def in_float64(case):
    """The same case, widened exactly, on the CPU."""
    return [t.detach().cpu().double().requires_grad_() if t.is_floating_point() else t.detach().cpu() for t in case]


def assert_equals_reference(got, case, dtype, activation="silu"):
    """Relative RMS and largest error of output and gradients against the reference in float64."""
    wanted = gradients(fused_moe_reference, in_float64(case), activation)
    for name, one, other in zip(NAMES, got, wanted, strict=True):
        assert_close(name, one, other, dtype)


def assert_close(name, got, wanted, dtype, slack=1):
    """Relative RMS and largest error of one tensor against the same in float64; `slack` widens both bounds."""
    got, wanted = got.detach().cpu().double(), wanted.detach()
    assert got.shape == wanted.shape, name
    if got.numel() == 0:
        return
    # A handful of numbers may be small differences of large ones.
    bound = RMS[dtype] * slack * (4 if wanted.numel() < 16 else 1)
    error, size = (got - wanted).square().mean().sqrt().item(), wanted.square().mean().sqrt().item()
    assert error <= bound * size, f"{name}: relative RMS {error / max(size, 1e-300):.2e}"
    largest, top = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert largest <= 4 * bound * top, f"{name}: largest error {largest / max(top, 1e-300):.2e} of largest"


def tile_errors(function, case, activation="silu"):
    """The largest error of a 128 x 128 tile of output and gradients, by name, against the loop in float64."""
    x, gate_up, down, ids, weights = case
    output = function(*case, activation=activation)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output)
    output.backward(grad)
    operands = [t.detach() for t in (x, gate_up, down, ids, weights)]
    wanted = expert_loop(*operands, activation=activation, grad_output=grad, dtype=torch.float64)
    got = [output.detach(), *(case[i].grad for i in (0, 1, 2, 4))]
    return {name: largest_tile_error(*pair) for name, *pair in zip(NAMES, got, wanted, strict=True)}


def assert_tiles_equal_reference(function, case, dtype, activation="silu"):
    """Every tile of output and gradients is right."""
    errors = tile_errors(function, case, activation)
    assert all(error <= TILE_TOLERANCE[dtype] for error in errors.values()), errors
