"""Triton kernels where a token has one expert, and where there are fewer rows than slots.

Like ``test_triton_layer.py`` these run on a GPU, or in a process started with TRITON_INTERPRET=1.
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from moe_cases import assert_equals_reference, gradients, make_case
from row_bound_cases import (
    NUM_EXPERTS,
    assert_bounds_change_nothing,
    assert_bounds_change_nothing_under_adapters,
    bounded_case,
    kept_rows,
)

from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import combine as combine_module
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu import routing_metadata

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("guarded_buffers")
slow = pytest.mark.slow


@pytest.fixture
def no_combine(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("combine was launched")

    monkeypatch.setattr(fused_moe_gpu, "combine", refuse)


@pytest.mark.parametrize(
    "pattern", ["some_unused", *(pytest.param(p, marks=slow) for p in ("random", "all_unused", "one_expert"))]
)
def test_one_expert_per_token_is_not_combined(pattern, no_combine):
    case = make_case(torch.float64, T=70, K=1, H=19, I=17, pattern=pattern, device=DEVICE)
    assert_equals_reference(gradients(fused_moe, case), case, torch.float64)


@slow
def test_one_expert_per_token_in_bf16(no_combine):
    case = make_case(torch.bfloat16, T=70, K=1, H=35, I=19, device=DEVICE)
    assert_equals_reference(gradients(fused_moe, case), case, torch.bfloat16)


@pytest.mark.parametrize("num_slots", [pytest.param(1, marks=slow), 3])
def test_a_bound_changes_nothing(num_slots):
    assert_bounds_change_nothing(torch.float64, DEVICE, T=23, K=num_slots, H=19, I=17)


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [1, pytest.param(3, marks=slow)])
def test_a_bound_changes_nothing_under_adapters(num_slots):
    assert_bounds_change_nothing_under_adapters(DEVICE, T=23, K=num_slots, H=19, I=17)


def test_less_is_kept():
    assert kept_rows(100, DEVICE, T=40, H=19, I=17) == 100


@pytest.mark.slow
@pytest.mark.parametrize("num_slots", [pytest.param(1, marks=slow), 3])
def test_a_token_without_a_row_comes_out_nan(num_slots):
    """So do its gradients; all others are as ever."""
    case, used = bounded_case(torch.float64, DEVICE, T=40, K=num_slots, H=19, I=17)
    missing = 5
    output, grad_x, _, _, grad_weights = gradients(lambda *t, activation: fused_moe(*t, max_rows=used - missing), case)
    is_used = case[3] < NUM_EXPERTS
    order = case[3].masked_fill(~is_used, NUM_EXPERTS).flatten().argsort(stable=True)
    lost = torch.zeros_like(is_used).flatten()
    lost[order[used - missing : used]] = True
    lost = lost.view_as(is_used)
    assert torch.equal(output.isnan().all(1), lost.any(1)) and torch.equal(output.isnan().any(1), lost.any(1))
    assert torch.equal(grad_x.isnan().all(1), lost.any(1))
    assert torch.equal(grad_weights.isnan(), lost)
    whole = gradients(fused_moe, bounded_case(torch.float64, DEVICE, T=40, K=num_slots, H=19, I=17)[0])[0]
    torch.testing.assert_close(output[~lost.any(1)], whole[~lost.any(1)])


@pytest.mark.parametrize("max_rows", [0, 1, 16, 100, 5000])
def test_bounded_order(max_rows):
    """Across two chunks: the first rows of the unbounded order, -2 for slots beyond."""
    ids = torch.randint(0, 9, (700, 2), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = routing_metadata.routing_metadata(ids, 6, 16, max_rows)
    whole = routing_metadata.routing_metadata_reference(ids.cpu(), 6, 16)
    used = min(max_rows, int(whole.expert_start[-1]))
    assert found.row_slot.numel() == max_rows
    assert torch.equal(found.row_slot[:used].cpu(), whole.row_slot[:used])
    assert torch.equal(found.slot_row.cpu(), whole.slot_row.masked_fill(whole.slot_row >= max_rows, -2))
    assert torch.equal(found.expert_start.cpu(), whole.expert_start.clamp(max=max_rows))
    counts = found.expert_start.diff()
    assert torch.equal(found.tile_start.diff(), (counts + 15) // 16)


def test_combine_leaves_unused_slots_out_and_shows_missing_ones():
    rows = torch.arange(6.0, device=DEVICE).view(3, 2)
    slot_row = torch.tensor([0, -1, 2, 1, -2, 0], dtype=torch.int32, device=DEVICE)
    output = combine_module.combine(rows, slot_row, 2)
    assert output[:2].tolist() == [[0.0, 1.0], [6.0, 8.0]] and output[2].isnan().all()
