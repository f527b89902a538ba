"""What a dry run says a training needs, against what its process takes; the counted part against shapes."""

import pytest
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from training_memory import TINY, measure

from deepseek_training.launch.training_memory import count_kept, estimate_training
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_training_takes_about_what_its_plan_says():
    """Of two sizes the difference; a ninth more is taken than counted, where 5 % was the goal."""
    tiny, large = measure(TINY, ""), measure("20m", "")
    assert large["plan"] - tiny["plan"] == pytest.approx(large["peak"] - tiny["peak"], rel=0.2)


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
