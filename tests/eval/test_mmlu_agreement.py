"""Our MMLU answers against lm-evaluation-harness 0.4.13's, question by question.

``reference/`` holds three small checkpoints, a fixed slice of 570 questions, what lm_eval answered on it and what it
predicted on all 14,042 questions; the scripts beside them made these. The slow tests compare on all questions, and run
lm_eval itself where an interpreter that has it is named by ``LM_EVAL_PYTHON``.
"""

import dataclasses
import gzip
import json
import os
import subprocess
from pathlib import Path

import pytest

from deepseek_eval.answers.loglikelihood import encode_items, plan_batches, score_batches, supports_shared_prefix
from deepseek_eval.model_loading import load_model
from deepseek_eval.tasks import mmlu

REFERENCE = Path(__file__).resolve().parent / "reference"
MODELS = ("ours", "llama", "v3")
# fp32 sums in another order; a prediction may differ only where its two best answers are closer than this.
TIE = 1e-4


def read_reference() -> dict[tuple[str, int], dict[str, list[float]]]:
    answers = {}
    with gzip.open(REFERENCE / "lm_eval_0.4.13.jsonl.gz", "rt") as file:
        for row in map(json.loads, file):
            answers.setdefault((row["model"], row["num_fewshot"]), {})[row["id"]] = row["loglikelihoods"]
    return answers


def score(model: str, num_fewshot: int, ids: set[str] | None, batch_size: int = 32) -> tuple[dict, dict]:
    """Our log-likelihoods and whether each prompt was cut, by question."""
    loaded = load_model(REFERENCE / model, dtype="float32")
    items = [item for item in mmlu.build_items(num_fewshot, None, None) if ids is None or item.id in ids]
    encoded = encode_items(loaded, items)
    batches = plan_batches(encoded, batch_size, can_share=num_fewshot > 0 and supports_shared_prefix(loaded))
    pairs = list(score_batches(loaded, batches))
    return {row.item.id: scores for row, scores in pairs}, {row.item.id: row.is_truncated for row, _ in pairs}


def test_a_group_without_a_name_keeps_its_shots():
    loaded = load_model(REFERENCE / "llama", dtype="float32")
    items = list(mmlu.build_items(2, 1, None))[:3]
    named, unnamed = ([dataclasses.replace(item, group=group) for item in items[:1] * 3] for group in ("g", ""))
    scores = []
    for group in (named, unnamed):
        batches = list(plan_batches(encode_items(loaded, group), 2, can_share=True))
        assert any(batch.num_shared for batch in batches)
        scores.append([row for _, row in score_batches(loaded, batches)])
    assert len(scores[0]) == 3 and scores[0] == scores[1]


def find_disagreements(ours: dict, theirs: dict) -> tuple[list[str], list[str]]:
    """Questions whose prediction differs: those that are ties, and those that are not."""
    ties, errors = [], []
    for name, scores in theirs.items():
        best, second = sorted(scores, reverse=True)[:2]
        if ours[name].index(max(ours[name])) != scores.index(best):
            (ties if best - second < TIE else errors).append(name)
    return ties, errors


@pytest.mark.parametrize(
    ("model", "num_fewshot"),
    [
        ("ours", 5),
        ("llama", 0),
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("ours", 0), ("llama", 5), ("v3", 0), ("v3", 5))),
    ],
)
def test_answers_equal_lm_eval_on_the_slice(model, num_fewshot):
    theirs = read_reference()[model, num_fewshot]
    assert len(theirs) == 570
    ours, is_truncated = score(model, num_fewshot, set(theirs))
    ties, errors = find_disagreements(ours, theirs)
    assert not errors
    assert len(ties) <= 2, ties
    difference = max(abs(a - b) for name in theirs for a, b in zip(ours[name], theirs[name], strict=True))
    # Observed on two machines' worth of thread counts: below 1e-5 plus the file's rounding to five decimals.
    assert difference < 5e-5
    # The slice must exercise the cut from the left, or agreement on it would go untested.
    assert any(is_truncated.values()) == (num_fewshot == 5)


def test_the_slice_is_the_one_its_rule_gives():
    names = json.loads((REFERENCE / "slice.json").read_text())
    assert len(names) == 570
    assert {name.split("/")[0] for name in names} == set(mmlu.SUBJECT_CATEGORIES)
    assert set(names) == set(read_reference()["ours", 0])


def read_all_predictions() -> dict[str, dict]:
    return json.loads(gzip.decompress((REFERENCE / "lm_eval_0.4.13_all.json.gz").read_bytes()))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("run", read_all_predictions())
def test_predictions_equal_lm_evals_on_all_questions(run):
    """Without lm_eval: its predictions are stored, and how far apart the near ties were."""
    model, num_fewshot = run.split()
    theirs = read_all_predictions()[run]
    names = [item.id for item in mmlu.build_items(0, None, None)]
    assert len(theirs["predictions"]) == len(names) == 14_042
    ours, is_truncated = score(model, int(num_fewshot), None)
    differing = [
        name
        for name, letter in zip(names, theirs["predictions"], strict=True)
        if "ABCD"[ours[name].index(max(ours[name]))] != letter
    ]
    print(f"{run}: {sum(is_truncated.values())} prompts cut, near ties that differ: {differing}")
    assert all(theirs["near_ties"].get(name, 1.0) < TIE for name in differing), differing
    assert len(differing) <= len(theirs["near_ties"]) < 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("num_fewshot", [0, 5])
@pytest.mark.parametrize("model", MODELS)
def test_answers_equal_lm_eval_on_all_questions(model, num_fewshot, tmp_path):
    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        pytest.skip("LM_EVAL_PYTHON names no interpreter with lm_eval 0.4.13")
    output = tmp_path / "answers.jsonl.gz"
    command = [python, str(REFERENCE / "run_lm_eval.py"), str(REFERENCE / model), str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run([*command, "--num-fewshot", str(num_fewshot)], check=True, env=environment, capture_output=True)
    with gzip.open(output, "rt") as file:
        theirs = {row["id"]: row["loglikelihoods"] for row in map(json.loads, file)}
    assert len(theirs) == 14_042
    ours, _ = score(model, num_fewshot, None)
    ties, errors = find_disagreements(ours, theirs)
    print(f"{model}, {num_fewshot} shots: {len(ties)} ties closer than {TIE} differ: {ties}")
    assert not errors
