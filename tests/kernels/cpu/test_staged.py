"""Which products few rows per expert take, torch's loop over groups or one product each, with the same result."""

import pytest
import torch

from deepseek_kernels.cpu import staged
from deepseek_kernels.fused_moe import fused_moe

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


def make(dtype, T=120, H=32, I=16, E=40, K=4):  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (torch.randn(n, generator=generator) for n in ((T, H), (E, 2 * I, H), (E, H, I)))
    ids = torch.rand(T, E, generator=generator).topk(K, 1).indices
    floats = [t.to(dtype).requires_grad_() for t in (x, gate_up / H**0.5, down / I**0.5)]
    return [*floats, ids, torch.rand(T, K, generator=generator).to(dtype)]


def gradients(case, **settings):
    output = fused_moe(*case, **settings)
    return [output.detach(), *torch.autograd.grad(output.float().square().sum(), case[:3])]


@pytest.fixture
def calls(monkeypatch):
    """How often torch's loop ran."""
    made, original = [], staged.F.grouped_mm
    monkeypatch.setattr(staged.F, "grouped_mm", lambda *a, **k: made.append(1) or original(*a, **k))
    return made


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_both_ways_give_the_same(dtype, has_bias, calls, monkeypatch):
    case = make(dtype)
    settings = {"gate_up_bias": torch.randn(40, 32).to(dtype)} if has_bias else {}
    got = gradients(case, **settings)
    assert len(calls) == 2
    monkeypatch.setattr(staged, "takes_groups", lambda *arguments: False)
    for one, other in zip(got, gradients(case, **settings), strict=True):
        assert (one - other).norm() <= TOLERANCE[dtype] * other.norm()
    assert len(calls) == 2


def unused(case):
    case[3][5, 2] = 40


@pytest.mark.parametrize(
    ("change", "shape"),
    [
        (lambda case: None, {"E": 8}),  # many rows per expert
        (lambda case: None, {"H": 35, "I": 19}),  # no multiple of 16 bytes
        (unused, {}),  # no room for a row of zeros
    ],
    ids=["many", "odd", "unused"],
)
def test_elsewhere_every_expert_has_its_product(change, shape, calls):
    case = make(torch.float32, **shape)
    change(case)
    assert gradients(case)[0].isfinite().all() and not calls
