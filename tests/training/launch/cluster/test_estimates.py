"""The arithmetic of a large run against other counts of the same things, and against simpler cases by hand."""

import dataclasses

import pytest
from transformers import LlamaConfig, MixtralConfig

from deepseek_training.launch.cluster.devices import GIB, find_device
from deepseek_training.launch.cluster.layout import Layout, check_layout, stages_of
from deepseek_training.launch.cluster.memory import activation_bytes, estimate_memory
from deepseek_training.launch.cluster.savings import find_savings
from deepseek_training.launch.cluster.search import find_layouts, fits
from deepseek_training.launch.cluster.shape import read_shape
from deepseek_training.launch.cluster.step_estimate import estimate_step
from deepseek_training.launch.cluster.traffic import estimate_traffic
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters

H100 = find_device("h100")


@pytest.fixture(scope="module")
def large():
    return read_shape(DeepseekConfig.from_preset("154b"), "154b")


@pytest.fixture(scope="module")
def small():
    return read_shape(DeepseekConfig.from_preset("debug", n_routed_experts=8), "debug")


def test_parameters_and_flops_are_those_of_params(large):
    count = count_parameters(DeepseekConfig.from_preset("154b"), 10.0)
    assert large.total == count.total
    assert large.active == pytest.approx(count.active, rel=1e-3)
    assert large.flops_per_token(4096) == pytest.approx(3 * count.flops_per_token(4096), rel=2e-3)


@pytest.mark.parametrize(
    ("config", "experts"),
    [
        (LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4), 0),
        (MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4), 8),
    ],
)
def test_stock_families_are_read(config, experts):
    shape = read_shape(config, "stock")
    assert shape.num_experts == experts and len(shape.layers) == 3
    assert shape.num_moe_layers == (3 if experts else 0)
    routed = sum(layer.routed for layer in shape.layers)
    assert routed == (3 * 8 * 3 * 64 * 96 if experts else 0)


def test_memory_of_one_device_by_hand(small):
    memory = estimate_memory(small, Layout(data=1, zero=0, batch=1, length=32))
    assert memory.weights == 2 * small.total
    assert memory.gradients == 4 * small.total
    assert memory.optimizer == 12 * small.total
    assert memory.exchange == 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_zero_divides_what_it_says(small, zero):
    alone = estimate_memory(small, Layout(data=4, zero=0, batch=4, length=32))
    split = estimate_memory(small, Layout(data=4, zero=zero, batch=4, length=32))
    assert split.optimizer == alone.optimizer / 4
    assert split.gradients == alone.gradients / (4 if zero >= 2 else 1)
    assert (split.weights < alone.weights) == (zero == 3)


def test_experts_are_divided_and_their_copies_share_the_states(small):
    layout = Layout(data=8, expert=4, zero=1, batch=8, length=32)
    routed = sum(layer.routed for layer in small.layers)
    memory = estimate_memory(small, layout)
    assert memory.weights == 2 * (small.total - routed + routed / 4)
    assert memory.optimizer == 12 * ((small.total - routed) / 8 + routed / 4 / 2)


@pytest.mark.parametrize(("pipeline", "virtual"), [(4, 1), (8, 2), (5, 1), (16, 4)])
def test_stages_hold_every_layer_once(large, pipeline, virtual):
    stages = stages_of(Layout(data=1, pipeline=pipeline, virtual=virtual, batch=pipeline), large)
    assert sum(len(stage) for stage in stages) == len(large.layers)
    assert max(map(len, stages)) - min(map(len, stages)) <= virtual


def test_recomputation_keeps_less_in_order(large):
    layout = Layout(data=1)
    kept = [activation_bytes(large, large.layers[-1], layout, recompute=how) for how in ("none", "selective", "full")]
    assert kept == sorted(kept, reverse=True) and kept[2] == 2 * large.hidden


def test_each_way_of_keeping_less_is_counted_like_the_plan(large):
    layout = Layout(data=8, zero=1, batch=8)
    plain, ways = estimate_memory(large, layout), {one.way: one for one in find_savings(large, layout)}
    again, short, host, every = ways.values()
    assert again.memory.total < plain.total and again.memory.optimizer == plain.optimizer
    assert short.memory.optimizer / plain.optimizer == pytest.approx((4 + 2 * (1 + 4 / 256)) / 12)
    assert host.memory.optimizer == 0 and host.host_bytes == plain.optimizer
    assert every.memory.total == min(one.memory.total for one in ways.values())
    assert every.host_bytes == short.memory.optimizer
    taken = dataclasses.replace(layout, recompute="full", moment_bytes=1)
    assert [one.way for one in find_savings(large, taken)] == ["optimizer on the CPU"]


def test_tokens_cross_the_network_once_per_node(large):
    within = estimate_traffic(large, Layout(data=64, expert=8, batch=64), H100).experts
    across = estimate_traffic(large, Layout(data=64, expert=64, batch=64), H100).experts
    assert within.network_bytes == 0 and across.network_bytes > 0
    # 10 experts over 8 nodes: fewer than 8 copies of a token leave its node, each of two bytes four times over.
    most = 4096 * large.num_moe_layers * large.hidden * 8 * 7
    assert 0.6 * most < across.network_bytes < most


def test_more_passes_shrink_the_bubble_and_nothing_else(large):
    few, many = (
        estimate_step(large, Layout(data=8, pipeline=8, virtual=2, expert=8, batch=8 * n), H100) for n in (8, 32)
    )
    assert few.bubble == pytest.approx(many.bubble)
    assert many.products == pytest.approx(4 * few.products)
    assert many.mfu > few.mfu


def test_what_is_found_fits_and_uses_no_more_devices_than_there_are(large):
    found = find_layouts(large, H100, 1000, Layout(data=1, batch=4096, length=4096), set())
    assert found and all(fits(one.memory, H100) and one.layout.world <= 1000 for one in found)
    speeds = [one.step.tokens / one.step.seconds for one in found]
    assert speeds == sorted(speeds, reverse=True)
    assert fits(found[0].memory, dataclasses.replace(H100, memory_bytes=1 * GIB)) is False


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"expert": 3, "data": 3, "batch": 3}, "--expert: got 3, expected a divisor of 128 experts"),
        ({"expert": 64, "data": 32, "batch": 32}, "--expert: got 64, expected a divisor of DP x TP = 32"),
        ({"tensor": 3}, "--tensor: got 3, expected a divisor of 128 heads"),
        ({"pipeline": 65, "batch": 65}, "--pipeline: got 65 parts, expected at most 64 layers"),
        ({"pipeline": 8, "batch": 4}, "--batch: got 4 passes per step, expected at least the 8 pipeline stages"),
        ({"data": 8, "batch": 12}, "--batch: got 12, expected a multiple of DP x micro batch = 8"),
        ({"zero": 3, "pipeline": 2, "batch": 2}, "--zero: got 3 beside --pipeline"),
        ({"zero": 4}, "--zero: got 4, expected 0, 1, 2 or 3"),
        ({"virtual": 2}, "--virtual: got 2, expected 1 without --pipeline"),
        ({"schedule": "dualpipe"}, "--schedule: got dualpipe, expected at least 2 pipeline stages"),
        ({"data": 0}, "--data: got 0, expected at least 1"),
        ({"moment_bytes": 3}, "--moment-bytes: got 3, expected 1, 2 or 4"),
        ({"precision": "int4"}, "--precision: got 'int4', expected one of bf16, fp8"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_one_line(large, settings, message):
    with pytest.raises(ValueError) as caught:
        check_layout(Layout(**{"data": 1, "batch": 1, **settings}), large)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
