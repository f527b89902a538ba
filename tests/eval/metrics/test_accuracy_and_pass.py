"""The shipped metrics against other implementations and by hand, loaded offline as a user would."""

import itertools
import math
import random
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest

import deepseek_eval

METRICS = Path(deepseek_eval.__file__).resolve().parent / "metrics"


@pytest.fixture(scope="module")
def choice_accuracy():
    return evaluate.load(str(METRICS / "choice_accuracy"))


@pytest.fixture(scope="module")
def pass_at_k():
    return evaluate.load(str(METRICS / "pass_at_k"))


FOLDERS = sorted(path.name for path in METRICS.iterdir() if path.is_dir() and path.name != "__pycache__")


@pytest.mark.parametrize("name", FOLDERS)
def test_every_metric_has_its_card_and_is_an_evaluation_module(name):
    metric = evaluate.load(str(METRICS / name))
    assert isinstance(metric, evaluate.EvaluationModule)
    assert metric.description and metric.citation and metric.inputs_description
    assert (METRICS / name / "README.md").read_text().startswith("---\ntitle:")


def test_micro_average_and_errors_by_hand(choice_accuracy):
    # Group a: 2 of 3; group b: 1 of 2. Micro 3/5; macro (2/3 + 1/2) / 2.
    result = choice_accuracy.compute(
        predictions=[0, 1, 2, 3, 0],
        references=[0, 1, 0, 3, 1],
        groups=["a", "a", "a", "b", "b"],
        categories={"a": "x", "b": "x"},
    )
    assert result["acc"] == pytest.approx(3 / 5)
    assert result["macro_acc"] == pytest.approx(7 / 12)
    assert result["groups"]["a"] == {"acc": 2 / 3, "acc_stderr": pytest.approx(math.sqrt(2 / 9 / 2)), "n": 3}
    # Pooled variance: (3 * 2/9 + 2 * 1/4) / (5 - 2), over n.
    assert result["acc_stderr"] == pytest.approx(math.sqrt((2 / 3 + 1 / 2) / 3 / 5))
    assert result["categories"]["x"]["n"] == 5


def test_errors_cover_the_truth_as_often_as_they_should(choice_accuracy):
    """A standard error is right when the truth lies within two of them about 95 times in 100."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        hits = generator.random(400) < 0.3
        result = choice_accuracy.compute(predictions=hits.astype(int), references=[1] * 400)
        covered += abs(result["acc"] - 0.3) < 2 * result["acc_stderr"]
    assert 0.90 <= covered / 200 <= 0.99


def test_one_question_has_no_error(choice_accuracy):
    assert choice_accuracy.compute(predictions=[1], references=[1]) == {"acc": 1.0, "acc_stderr": None, "n": 1}


def test_pass_at_k_equals_counting_all_subsets(pass_at_k):
    """The unbiased estimate is the share of k-subsets of the samples with a pass in them."""
    right, wrong = "x = 1", "x = 2"
    rows = [[right, wrong, wrong, wrong], [right, right, right, wrong], [wrong] * 4]
    result = pass_at_k.compute(predictions=rows, references=["assert x == 1"] * 3, k=[1, 2, 4, 5])
    for k in (1, 2, 4):
        shares = [np.mean([right in subset for subset in itertools.combinations(row, k)]) for row in rows]
        assert result[f"pass@{k}"] == pytest.approx(np.mean(shares))
        assert result[f"pass@{k}_stderr"] == pytest.approx(np.std(shares, ddof=1) / math.sqrt(3))
    assert "pass@5" not in result
    assert [[sample["passed"] for sample in row] for row in result["samples"]] == [
        [p == right for p in row] for row in rows
    ]


def test_pass_at_k_takes_what_code_eval_takes(pass_at_k):
    result = pass_at_k.compute(
        references=["assert add(2, 3) == 5"],
        predictions=[["def add(a, b): return a * b", "def add(a, b): return a + b"]],
        k=[1, 2],
    )
    assert (result["pass@1"], result["pass@2"]) == (0.5, 1.0)


def test_a_problem_without_samples_is_refused(pass_at_k):
    with pytest.raises(ValueError, match="problem 1 has no sample"):
        pass_at_k.compute(references=["", ""], predictions=[["pass"], []])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: got 0, expected a whole number"),
        ({"k": [1, -2]}, "k: got -2, expected a whole number"),
        ({"k": [1.5]}, "k: got 1.5, expected a whole number of at least 1"),
        ({"predictions": [], "references": []}, "predictions: no problem"),
    ],
)
def test_what_has_no_answer_is_refused_before_anything_runs(pass_at_k, options, message):
    def ran():
        raise AssertionError("a program ran")

    with pytest.raises(ValueError, match=message):
        pass_at_k.compute(**{"predictions": [["x = 1"]], "references": ["assert x"], "on_result": ran, **options})


def test_k_beyond_the_fewest_samples_is_named_once(pass_at_k, caplog):
    rows = [["x = 1", "x = 2", "x = 1"], ["x = 1", "x = 2"]]
    result = pass_at_k.compute(predictions=rows, references=["assert x == 1"] * 2, k=[5, np.int64(2), 1, 3])
    assert set(result) == {"pass@1", "pass@1_stderr", "pass@2", "pass@2_stderr", "n", "samples"}
    told = [record.getMessage() for record in caplog.records]
    assert told == ["pass@3, pass@5 left out: a problem has only 2 samples"]


def test_results_keep_their_order_under_any_timing(pass_at_k):
    delays = [random.Random(0).choice((0.0, 0.1)) for _ in range(24)]
    programs = [f"import time\ntime.sleep({delay})\nx = {index % 2}" for index, delay in enumerate(delays)]
    result = pass_at_k.compute(predictions=[[p] for p in programs], references=["assert x"] * 24, k=[1], num_workers=4)
    assert [row[0]["passed"] for row in result["samples"]] == [bool(index % 2) for index in range(24)]


@pytest.mark.slow
def test_metrics_load_in_a_process_without_network(tmp_path):
    """Under unshare there is no network at all; a metric that fetches anything would fail."""
    code = (
        f"import evaluate; m = evaluate.load({str(METRICS / 'choice_accuracy')!r}); "
        "print(m.compute(predictions=[1], references=[1])['acc'])"
    )
    command = ["unshare", "-rn", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    if "Operation not permitted" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.stdout.strip() == "1.0", done.stderr
