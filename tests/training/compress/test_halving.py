"""The article's pair: the small preset is a slice of the large one, and so is each model between of the last."""

import pytest

from deepseek_training.compress.halving import as_markdown, plan_halvings
from deepseek_training.compress.student_config import obstacles_to_shrink
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters


@pytest.fixture(scope="module")
def pair():
    return DeepseekConfig.from_preset("154b"), DeepseekConfig.from_preset("7.7b")


def test_the_small_preset_can_be_cut_from_the_large_one(pair):
    teacher, student = pair
    assert obstacles_to_shrink(teacher, student) == []
    assert count_parameters(teacher).total / count_parameters(student).total == pytest.approx(20, abs=0.1)
    without = DeepseekConfig.from_preset("7.7b", q_lora_rank=None)
    (obstacle,) = obstacles_to_shrink(teacher, without)
    assert obstacle.startswith("q_lora_rank: got None, expected a number like the teacher's 1536")


@pytest.mark.parametrize("num_rounds", [1, *(pytest.param(number, marks=pytest.mark.slow) for number in (4, 5))])
def test_each_round_is_a_slice_of_the_one_before_and_about_as_much_smaller(pair, num_rounds):
    teacher, student = pair
    rounds = plan_halvings(teacher, student, num_rounds, tokens=1e11, flops_per_second=250e12)
    assert rounds[-1].config is student and len(rounds) == num_rounds
    before, total = teacher, count_parameters(teacher).total
    for one in rounds:
        assert obstacles_to_shrink(before, one.config) == []
        assert one.parameters / total == pytest.approx((1 / 20) ** (1 / num_rounds), rel=0.25)
        before, total = one.config, one.parameters


def test_memory_and_time_are_the_stated_arithmetic(pair):
    teacher, student = pair
    (only,) = plan_halvings(teacher, student, 1, tokens=1e9, flops_per_second=1e12)
    large, small = count_parameters(teacher), count_parameters(student)
    assert only.memory_gib == pytest.approx((16 * small.total + 2 * large.total) / 2**30)
    assert only.gpu_hours == pytest.approx(1e9 * (6 * small.active + 2 * large.active) / 1e12 / 3600)
    assert as_markdown(teacher, [only]).count("\n") == 3


def test_what_cannot_be_cut_is_told(pair):
    teacher, student = pair
    with pytest.raises(ValueError, match="rounds: got 0, expected at least 1"):
        plan_halvings(teacher, student, 0, tokens=1, flops_per_second=1)
    with pytest.raises(ValueError, match="not a slice of the teacher: first_k_dense_replace"):
        plan_halvings(student, teacher, 2, tokens=1, flops_per_second=1)
