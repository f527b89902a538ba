"""`max_rows` on a CPU: the same values with smaller buffers, and an error where they do not suffice."""

import pytest
import torch
from row_bound_cases import (
    assert_bounds_change_nothing,
    assert_bounds_change_nothing_under_adapters,
    bounded_case,
    kept_rows,
)

from deepseek_kernels.cpu import decode, staged
from deepseek_kernels.fused_moe import fused_moe


@pytest.fixture(params=["few", "small", "large"])
def either_path(request, monkeypatch):
    if request.param != "few":
        monkeypatch.setattr(decode, "MAX_ROWS", -1)
    if request.param == "large":
        monkeypatch.setattr(staged, "MAX_BYTES", -1)


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_bound_changes_nothing(num_slots, either_path):
    for dtype in (torch.float64, torch.bfloat16):
        assert_bounds_change_nothing(dtype, T=33, K=num_slots)


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_bound_changes_nothing_under_adapters(num_slots, either_path):
    assert_bounds_change_nothing_under_adapters(T=33, K=num_slots)


@pytest.mark.parametrize("pattern", ["all_unused", "one_expert"])
def test_none_used_and_all_used(pattern, either_path):
    assert_bounds_change_nothing(torch.float64, T=9, pattern=pattern)


def test_less_is_kept(either_path):
    assert kept_rows(None, T=40) == 120
    assert kept_rows(100, T=40) == 100


def test_compiled_calls_are_bounded_too():
    case, used = bounded_case(torch.float32, T=9)
    call = torch.compile(lambda *tensors: fused_moe(*tensors, max_rows=used), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(*case), fused_moe(*case))


def test_too_few_rows_are_an_error(either_path):
    case, used = bounded_case(torch.float32, T=40)
    with pytest.raises(ValueError, match=f"got {used} used slots, expected at most max_rows, {used - 1}"):
        fused_moe(*case, max_rows=used - 1)


def test_a_bound_that_cannot_be():
    case, _ = bounded_case(torch.float32, T=2)
    with pytest.raises(ValueError, match="max_rows: got -1, expected 0 or more"):
        fused_moe(*case, max_rows=-1)
