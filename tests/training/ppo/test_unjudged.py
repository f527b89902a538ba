"""A part of a reward that does not judge a completion: figures are over the others, and absent where there is none."""

import pytest

from deepseek_training.ppo.evaluation import average_by_prompt, mean_metrics
from deepseek_training.ppo.outcome import reward_rows


def test_figures_are_over_what_was_judged():
    rows = [
        {"index": 0, "reward": 0.5, "reward_safety": None, "reward_relevance": None, "completion": "a"},
        {"index": 0, "reward": 0.7, "reward_safety": 0.8, "reward_relevance": None, "completion": "b"},
        {"index": 1, "reward": 0.1, "reward_safety": 0.2, "reward_relevance": None, "completion": "c"},
        {"index": 2, "reward": 0.1, "reward_safety": None, "reward_relevance": None, "completion": "d"},
    ]
    averaged = average_by_prompt(rows)
    assert [row["reward_safety"] for row in averaged] == [0.8, 0.2, None]
    assert averaged[0]["reward"] == pytest.approx(0.6) and averaged[0]["completion"] == "a"
    columns = {key: [row[key] for row in averaged] for key in averaged[0]}
    metrics = mean_metrics(columns, "eval")
    assert metrics["eval_reward_safety"] == pytest.approx(0.5) and "eval_reward_relevance" not in metrics
    found = {row.metric: row for row in reward_rows("dialogues", "before", columns)}
    assert found["reward_safety"].n == 2 and found["reward"].n == 3 and "reward_relevance" not in found
