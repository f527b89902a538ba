"""The order of the slots, which `fused_moe` keeps for its backward pass, means the same on a CPU and a GPU."""

import pytest
import torch

from deepseek_kernels.cpu.experts import route
from deepseek_kernels.fused_moe import _forward_op

ROUTING = pytest.importorskip("deepseek_kernels.gpu.routing_metadata")


@pytest.mark.parametrize("shape", [(0, 2), (1, 1), (7, 3), (130, 8)])
def test_the_cpus_order_is_the_gpus(shape):
    """Expert 5 gets no slots, and indices of 6 and above are unused."""
    ids = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))
    ids[ids == 5] = 8
    got, want = route(ids, 6), ROUTING.routing_metadata_reference(ids, 6, block_m=16)
    used = int(want.expert_start[-1])
    assert torch.equal(got.row_slot[:used], want.row_slot[:used])
    assert torch.equal(got.slot_row, want.slot_row)
    assert torch.equal(got.expert_start, want.expert_start)
    assert got.counts() == [int((ids == expert).sum()) for expert in range(6)]


def test_the_operator_returns_the_order_only_where_it_is_kept():
    x, gate_up, down = torch.randn(4, 8), torch.randn(6, 4, 8), torch.randn(6, 8, 2)
    ids, weights = torch.randint(0, 8, (4, 3)), torch.rand(4, 3)
    kept = _forward_op(x, gate_up, down, ids, weights, "silu", True, None)
    dropped = _forward_op(x, gate_up, down, ids, weights, "silu", False, None)
    row_slot, slot_row, expert_start = kept[2:]
    order, used = route(ids, 6), int(expert_start[-1])
    assert torch.equal(row_slot[:used], order.row_slot[:used]) and row_slot.numel() == 12
    assert torch.equal(slot_row, order.slot_row) and torch.equal(expert_start, order.expert_start)
    assert [tensor.numel() for tensor in dropped[1:]] == [0, 0, 0, 0]
    assert torch.equal(kept[0], dropped[0])
