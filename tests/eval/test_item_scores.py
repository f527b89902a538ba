"""More is better in each kind of item, so that a fall is a fall."""

import json

from deepseek_eval.item_scores import read_item_scores


def test_scores_of_each_kind_of_item(tmp_path):
    rows = {
        "mmlu": [{"id": "a", "acc": 1}, {"id": "b", "acc": 0}],
        "humaneval": [{"id": "a", "passed": True}, {"id": "a", "passed": False}],
        "bits_per_byte": [{"id": "a", "bits_per_byte": 2.5, "loglikelihood": -9.0}],
        "crows_pairs": [{"id": "a", "choice": 1}, {"id": "b", "choice": 0}],
    }
    for task, of_task in rows.items():
        (tmp_path / f"samples_{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    (tmp_path / "samples_bbq.partial.jsonl").write_text("{")
    assert read_item_scores(tmp_path) == {
        "mmlu": {"a": 1.0, "b": 0.0},
        "humaneval": {"a": 0.5},
        "bits_per_byte": {"a": -2.5},
        "crows_pairs": {"a": 1.0, "b": 0.0},
    }
