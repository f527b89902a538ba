"""The weighted sum: renormalising, gating, standardizing, penalties, and its use by GRPO's own code path."""

import functools
import math

import pytest
from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

from deepseek_training.rewards import Diversity, MissingEosPenalty, Relevance, Safety, WeightedReward


def fixed(name, values):
    def reward(prompts, completions, completion_ids=None, **kwargs):
        return list(values)

    reward.__name__ = name
    return reward


P, C = ["p"] * 3, ["a", "b", "c"]


def test_is_the_weighted_mean():
    reward = WeightedReward([fixed("x", [1, 0.5, 0]), fixed("y", [0, 1, 1])], weights=[0.7, 0.3])
    assert reward(P, C) == pytest.approx([0.7, 0.65, 0.3])
    doubled = WeightedReward([fixed("x", [1, 0.5, 0]), fixed("y", [0, 1, 1])], weights=[1.4, 0.6])
    assert doubled(P, C) == pytest.approx(reward(P, C))


def test_a_missing_score_renormalizes():
    reward = WeightedReward([fixed("x", [0.5, None, None]), fixed("y", [1, 0.4, None])], weights=[0.7, 0.3])
    assert reward(P, C) == [pytest.approx(0.65), pytest.approx(0.4), None]


def test_the_gate_closes_in_proportion():
    parts = [fixed("relevance", [1, 1, 1]), fixed("safety", [0.9, 0.35, 0])]
    half_open = WeightedReward(parts, [0.7, 0.3], gate="safety", gate_threshold=0.7)
    assert half_open(P, C) == pytest.approx([0.97, 0.805 * 0.5, 0.0])
    always = WeightedReward(parts, [0.7, 0.3], gate="safety")
    assert always(P, C) == pytest.approx([0.97 * 0.9, 0.805 * 0.35, 0.0])
    assert WeightedReward(parts, [0.7, 0.3])(P, C)[2] == pytest.approx(0.7)  # without it 0.7 of relevance is kept


def test_penalties_come_off_and_the_sum_stays_bounded():
    reward = WeightedReward([fixed("x", [0.5, 0.5, 0.1])], [1], penalties=[fixed("pen", [-0.2, 0, -0.5])])
    assert reward(P, C) == pytest.approx([0.3, 0.5, 0.0])
    eos = WeightedReward([fixed("x", [0.5] * 3)], [1], penalties=[MissingEosPenalty(9, 0.3)])
    assert eos(P, C, [[1, 9], [1, 2], []]) == pytest.approx([0.5, 0.2, 0.2])
    # TRL's own penalty fits as it is: four equal tokens, two triples, one distinct
    trl = WeightedReward([fixed("x", [0.5] * 3)], [1], penalties=[get_repetition_penalty_reward(3, -0.4)])
    assert trl(P, C, [[1, 2, 3], [5, 5, 5, 5], [1]]) == pytest.approx([0.5, 0.3, 0.5])
    # and its punishment of length: free up to 6 tokens, in proportion up to 10, then everything
    length = WeightedReward([fixed("x", [0.5] * 3)], [1], penalties=[get_soft_overlong_punishment(10, 4)])
    assert length(P, C, [[1] * 6, [1] * 7, [1] * 12]) == pytest.approx([0.5, 0.25, 0.0])


def test_penalties_are_summed_before_the_sum_is_clipped():
    # clipped in between, the middle one would end at 0.7: 1.4 - 0.3 is above 1
    first, second = fixed("first", [-1.2, -0.3, None]), fixed("second", [0, -0.3, None])
    outside = WeightedReward([fixed("x", [0.9, 1.4, 1.4])], [1], penalties=[first, second])
    assert outside(P, C) == pytest.approx([0.0, 0.8, 1.0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([-0.1, 0], "penalty pen: 2 scores for 3 completions"),
        ([-0.1, math.nan, 0], "penalty pen: a score is not a finite number"),
        ([-0.1, -math.inf, 0], "penalty pen: a score is not a finite number"),
        ([-0.1, 0.2, 0], "penalty pen: 0.2 would be added to a score, expected 0 or less"),
    ],
)
def test_refuses_bad_penalties(values, message):
    with pytest.raises(ValueError, match=message):
        WeightedReward([fixed("x", [0.5] * 3)], [1], penalties=[fixed("pen", values)])(P, C)


@pytest.mark.parametrize("penalty", [-0.1, math.nan, math.inf])
def test_refuses_a_missing_eos_penalty_that_is_none(penalty):
    with pytest.raises(ValueError, match=f"penalty: got {penalty}, expected a finite number of 0 or more"):
        MissingEosPenalty(1, penalty)


def test_rewards_need_names_of_their_own():
    with pytest.raises(ValueError, match=r"rewards: named relevance, x, relevance, expected a __name__ of its own"):
        WeightedReward([Relevance(), fixed("x", [1]), Relevance()], [1, 1, 1])
    nameless = functools.partial(fixed("x", [1]))
    with pytest.raises(ValueError, match=r"rewards: number 1 \(partial\) has no __name__"):
        WeightedReward([fixed("y", [1]), nameless], [1, 1])


def test_standardizing_gives_each_part_the_same_spread():
    narrow, wide = [0.80, 0.82, 0.84], [0.0, 0.5, 1.0]
    plain = WeightedReward([fixed("narrow", narrow), fixed("wide", wide[::-1])], [0.5, 0.5])
    assert plain(P, C)[0] > plain(P, C)[2]  # the wide part decides, whatever the weights say
    standard = WeightedReward([fixed("narrow", narrow), fixed("wide", wide[::-1])], [0.5, 0.5], is_standardized=True)
    assert standard(P, C) == pytest.approx([0.5] * 3, abs=0.03)
    assert all(0 <= score <= 1 for score in standard(P, C))


def test_moments_run_over_training_batches_only_and_survive():
    scores = {"value": [0.2, 0.4, 0.6]}
    reward = WeightedReward([lambda **kw: scores["value"]], [1], is_standardized=True)
    reward(P, C)
    before = dict(reward.moments)
    scores["value"] = [0.9, 0.9, 0.9]
    reward(P, C, is_evaluation=True)
    assert reward.moments == before
    other = WeightedReward([lambda **kw: scores["value"]], [1], is_standardized=True)
    other.load_state_dict(reward.state_dict())
    assert other(P, C) == reward(P, C)
    assert reward.moments["<lambda>"][0] > before["<lambda>"][0]


def test_logs_each_part():
    metrics, columns = {}, {}
    reward = WeightedReward([fixed("x", [1, None, 0])], [1])
    reward(P, C, log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
    assert metrics == {"reward_x": 0.5}
    assert columns == {"reward_x": [1, None, 0]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weights=[-0.1]), "expected finite numbers of at least 0"),
        (dict(weights=[0.0]), "with a sum above 0"),
        (dict(weights=[math.nan]), "expected finite numbers of at least 0"),
        (dict(weights=[0.5, 0.5]), "2 given for 1 rewards"),
        (dict(weights=[1], gate="safety"), "expected x"),
        (dict(weights=[1], gate="x", gate_threshold=0), "gate_threshold: got 0"),
    ],
)
def test_refuses_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightedReward([fixed("x", [1])], **arguments)


def test_refuses_bad_scores():
    with pytest.raises(ValueError, match="reward x: 2 scores for 3 completions"):
        WeightedReward([fixed("x", [1, 1])], [1])(P, C)
    with pytest.raises(ValueError, match="reward x: a score is not a finite number"):
        WeightedReward([fixed("x", [1, math.nan, 1])], [1])(P, C)


def test_the_article_setting_is_bounded_and_keeps_its_state():
    reward = WeightedReward([Relevance(), Safety(), Diversity()], weights=[0.7, 0.2, 0.1])
    texts = ["The kidneys filter the blood and make urine.", "", "kidney " * 30]
    scores = reward(["What do kidneys do?"] * 3, texts)
    assert all(0 <= score <= 1 for score in scores)
    assert scores[0] == max(scores)
    other = WeightedReward([Relevance(), Safety(), Diversity()], weights=[0.7, 0.2, 0.1])
    other.load_state_dict(reward.state_dict())
    assert other(["What do kidneys do?"], texts[:1]) == reward(["What do kidneys do?"], texts[:1])


def test_a_penalty_that_gets_no_token_ids_says_so():
    reward = WeightedReward([fixed("x", [0.5])], [1], penalties=[MissingEosPenalty(1, 0.1)])
    with pytest.raises(ValueError, match="missing_eos_penalty: completion_ids: got None"):
        reward(prompts=["a"], completions=["b"])
