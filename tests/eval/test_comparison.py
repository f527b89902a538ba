"""The paired comparison by hand, against scipy-free arithmetic, and for its rate of false alarms."""

import json

import numpy as np
import pytest

from deepseek_cli.main import main
from deepseek_eval.comparison import compare_hits, compare_runs
from deepseek_records.run_folder import RunFolder


def test_by_hand():
    # Better on two items, worse on none, equal on two: mean 1/2, sample variance 1/3, sign test 2 * (1/2)^2.
    result = compare_hits("x", {"a": 0, "b": 0, "c": 1, "d": 0}, {"a": 1, "b": 1, "c": 1, "d": 0})
    assert result == {
        "first": 0.25,
        "second": 0.75,
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


def make_run(path, hits, **settings):
    RunFolder.create(path, settings, command="evaluate")
    rows = [{"id": f"q{i}", "acc": hit} for i, hit in enumerate(hits)]
    (path / "samples_mmlu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A benchmark without right and wrong has nothing to compare.
    (path / "samples_crows_pairs.jsonl").write_text('{"id": "p", "prediction": 0, "target": null}\n')


def test_the_command_compares_and_names_what_else_differs(tmp_path, capsys):
    make_run(tmp_path / "a", [0] * 8 + [1] * 4, model_name_or_path="a", num_fewshot=0)
    make_run(tmp_path / "b", [1] * 8 + [1] * 4, model_name_or_path="b", num_fewshot=5)
    assert main(["evaluate", "--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("mmlu")).split()
    # 8 better, none worse: p = 2 / 2^8.
    assert row == ["mmlu", "0.3333", "1.0000", "+0.6667", "0.1421", "12", "8", "0", "0.0078"]
    assert "crows_pairs" not in printed
    assert "differ in num_fewshot (0 | 5)." in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--compare", "nowhere", "nowhere"), "nowhere holds no samples_<task>.jsonl"),
        (("model", "--compare", "a", "b"), "give one of MODEL, --samples FILE, --compare RUN RUN and --table RUN ..."),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(words, message, capsys):
    assert main(["evaluate", *words]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
