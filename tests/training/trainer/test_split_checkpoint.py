"""Checkpoints in parts, written and read in one process; of several: test_distributed.py."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from deepseek_training.trainer import split_checkpoint
from deepseek_training.trainer.split_checkpoint import (
    load_split_optimizer,
    load_split_weights,
    save_split_optimizer,
    save_split_weights,
)
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


@pytest.fixture
def one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def trained(seed):
    """A model in the parts of one process, and its optimizer, after a step."""
    torch.manual_seed(seed)
    model = DeepseekForCausalLM(DeepseekConfig.from_preset("debug"))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(3, 500, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_parts_are_read_as_they_were_written(one_process, tmp_path):
    """In every version of transformers: make test-versions runs this too."""
    model, optimizer = trained(0)
    save_split_weights(model, tmp_path / "checkpoint")
    save_split_optimizer(model, optimizer, tmp_path / "checkpoint")

    again, other = trained(1)
    load_split_weights(again, tmp_path / "checkpoint")
    load_split_optimizer(again, other, tmp_path / "checkpoint")
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert isinstance(found[name], type(value)) and torch.equal(found[name], value), name
    assert any(isinstance(value, DTensor) for value in found.values())
    for one, two in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_a_strided_part_is_written_as_one_piece_and_read_as_it_was(one_process):
    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "ep"))
    strided = DTensor.from_local(torch.arange(8.0), mesh, [_StridedShard(0, split_factor=1), Shard(0)])
    placed = {"weight": strided, "step": torch.tensor(3.0)}
    written = split_checkpoint._in_one_piece(placed)
    assert written["weight"].placements == (Shard(0), Shard(0)) and written["step"] is placed["step"]
    back = split_checkpoint._placed_as(placed, written)
    assert back["weight"].placements == strided.placements
    assert torch.equal(back["weight"].to_local(), strided.to_local())
