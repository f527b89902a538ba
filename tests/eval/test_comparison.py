"""The paired comparison by hand, against scipy-free arithmetic, and for its rate of false alarms."""

import json

import numpy as np
import pytest

from deepseek_eval.comparison import compare_hits, compare_runs


def test_by_hand():
    # Better on two items, worse on none, equal on two: mean 1/2, sample variance 1/3, sign test 2 * (1/2)^2.
    result = compare_hits("x", {"a": 0, "b": 0, "c": 1, "d": 0}, {"a": 1, "b": 1, "c": 1, "d": 0})
    assert result == {
        "difference": 0.5,
        "stderr": pytest.approx((1 / 3 / 4) ** 0.5),
        "n": 4,
        "num_better": 2,
        "num_worse": 0,
        "p_value": 0.5,
    }


def test_equal_runs_do_not_differ():
    scores = {str(n): n % 2 for n in range(2000)}
    assert compare_hits("x", scores, scores)["p_value"] == 1.0


def test_false_alarms_stay_below_the_level_and_a_real_change_is_found():
    generator = np.random.default_rng(0)
    alarms = found = 0
    for _ in range(300):
        base = generator.random(400)
        first = {str(i): float(x < 0.5) for i, x in enumerate(base)}
        # Either run flips a tenth of its answers at random; then one gains a further tenth of all items.
        noise = {name: value if generator.random() > 0.1 else 1 - value for name, value in first.items()}
        alarms += compare_hits("x", first, noise)["p_value"] < 0.05
        gain = {name: max(value, float(generator.random() < 0.1)) for name, value in noise.items()}
        found += compare_hits("x", noise, gain)["p_value"] < 0.05
    assert alarms / 300 <= 0.08  # The exact test errs on the safe side; 0.08 is 0.05 and two standard errors.
    assert found / 300 > 0.95


def test_runs_are_read_from_their_folders(tmp_path):
    for name, hits in (("a", [1, 0, 0]), ("b", [1, 1, 0])):
        (tmp_path / name).mkdir()
        rows = [{"id": f"q{i}", "acc": hit} for i, hit in enumerate(hits)]
        (tmp_path / name / "samples_mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        rows = [{"id": "p", "sample": s, "passed": bool(hits[s])} for s in range(2)]
        (tmp_path / name / "samples_humaneval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = compare_runs(tmp_path / "a", tmp_path / "b")
    assert result["mmlu"]["difference"] == pytest.approx(1 / 3)
    assert result["humaneval"]["difference"] == pytest.approx(0.5)
    with pytest.raises(FileNotFoundError, match="holds no samples"):
        compare_runs(tmp_path, tmp_path / "b")
