"""What a dry run says a training needs, against what its process takes; the counted part against shapes."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from training_memory import measure

from deepseek_training.launch.expert_buffers import count_buffers
from deepseek_training.launch.training_memory import count_kept, estimate_training
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("size", "way"),
    [("20m", "fp32"), ("20m, 40 experts", "fp32"), ("nano, rows of 512", "fp32"), ("nano, rows of 512", "bf16")],
)
def test_a_training_takes_what_its_plan_says(size, way):
    """Every allocation of a whole training followed, those of the experts' pool included."""
    found = measure(size, way)
    assert found["plan"] == pytest.approx(found["most"], rel=0.05)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DeepseekForCausalLM(DeepseekConfig.from_preset("debug", router_bias_update_speed=0.01)).eval()


def test_counting_leaves_the_model_as_it_is(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.get_rng_state()
    count_kept(model, is_bf16=False)
    assert torch.equal(torch.get_rng_state(), drawn) and not model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_each_way_of_saving_saves(model):
    def total(**changes):
        ways = {"is_bf16": False, "is_checkpointed": False, "is_accumulated": True}
        return estimate_training(model, 4096, trained=model.num_parameters(), **{**ways, **changes}).total

    assert total(is_checkpointed=True) < total() and total(is_accumulated=False) < total()
    kept = count_kept(model, is_bf16=False)
    assert len(kept.layers) == model.config.num_hidden_layers and min(kept.layers) > kept.layer_input
    frozen = estimate_training(model, 64, trained=0, is_bf16=False, is_checkpointed=False, is_accumulated=True)
    assert frozen.gradients == frozen.moments == 0


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("is_whole", [True, False], ids=["the model", "its layers"])
def test_a_model_in_parts_is_counted_without_a_copy(model, process_group, is_whole):
    for part in [model] if is_whole else model.model.layers:
        fully_shard(part)
    ways = {"is_bf16": False, "is_checkpointed": False, "is_accumulated": True}
    assert estimate_training(model, 4096, trained=model.num_parameters(), **ways).total > 0


def test_experts_take_pages_and_their_gradients_once_more(monkeypatch):
    """By hand: two layers, 8 experts of 256 and 192, 4 of them per token, 1024 tokens."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 192, "n_routed_experts": 8, "num_experts_per_tok": 4}
    config = DeepseekConfig.from_preset("debug", **sizes, num_hidden_layers=2, first_k_dense_replace=0)
    config.min_experts_per_tok = config.target_experts_per_tok = None
    model = DeepseekForCausalLM(config)
    model.set_experts_implementation("fused_moe")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def count(**changes):
        ways = {"is_bf16": False, "is_checkpointed": False, "is_accumulated": True}
        found = count_buffers(model, 1024, **{**ways, **changes})
        return [value / 2**20 for value in (found.pages, found.pooled, found.passing, found.idle)]

    # Gradients of 3 and 1.5 MiB take 4 and 2, pre-activations of 6 MiB 6; rows: 4, 4 and a row, 3, 3, 3 and 6.
    assert count() == [2 * 1.5, 6 + 4 + 6 + 4 + 4 + 4 + 6, 0, 2 * 6 + 34]
    assert count(is_accumulated=False) == [3, 28, 0, 40]
    assert count(is_checkpointed=True) == [3, 34, 0, 6 + 34]
    # Gradients in bf16 take 2 MiB, and 0.75 that no pool has; pre-activations of 3 MiB 4; rows 2, 4, 2, 4, 4, 6. Cast
    # are pre-activations, the gradients of rows, and those of 4.5 MiB of weights.
    assert count(is_bf16=True) == [2 * 1, 2 + 22, 0.75 + 9 + 3 + 4.5, 2 * 4 + 24]
    model.set_experts_implementation("eager")
    assert count() == pytest.approx([0, 0, 4.5 + 4 + 4 + 3 + 3 + 3 + 6, 0], abs=0.01)
