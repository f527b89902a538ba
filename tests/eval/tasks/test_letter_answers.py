"""MMLU-Pro and MMLU-Redux against lm-evaluation-harness 0.4.13 on made-up rows of their format, item by item.

The stored file is what ``reference/run_lm_eval_letters.py`` wrote under lm_eval 0.4.13: the rows, each prompt, and
what the harness takes from a few answers. The data themselves are not shipped.
"""

import gzip
import json
import subprocess
from pathlib import Path

import pytest

from deepseek_eval.answers.generation import cut_at_stop
from deepseek_eval.harness import evaluate_model
from deepseek_eval.questions import read_questions
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.catalogue import TASKS
from deepseek_eval.tasks.letter_answers import LETTERS

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parents[1] / "reference"
STORED = REFERENCE / "lm_eval_0.4.13_letters.json.gz"
THEIRS = json.loads(gzip.decompress(STORED.read_bytes()))


@pytest.fixture
def data(tmp_path):
    files = {"mmlu_pro_test": THEIRS["pro_rows"]["test"], "mmlu_pro_validation": THEIRS["pro_rows"]["validation"]}
    for name, rows in {**files, "mmlu_redux": THEIRS["redux_rows"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def compare(task: str, items: list, theirs: list[dict]) -> None:
    assert len(items) == len(theirs) > 0
    for item, row in zip(items, theirs, strict=True):
        assert item.prompt == row["prompt"]
        assert list(item.stop) == row["until"]
        for answer, (taken, score) in row["answers"].items():
            rows = [{"prediction": cut_at_stop(answer, item.stop), "target": item.target}]
            inputs = TASKS[task].metric_inputs([item], rows)
            letter = inputs["predictions"][0]
            assert (LETTERS[letter] if letter >= 0 else "[invalid]") == taken
            assert float(letter == inputs["references"][0]) == score


@pytest.mark.parametrize("shots", [0, 5])
def test_mmlu_pro_is_item_equal(data, shots):
    settings = EvalSettings(tasks=("mmlu_pro",), num_fewshot=shots, data_path={"mmlu_pro": str(data)})
    compare("mmlu_pro", read_questions(TASKS["mmlu_pro"], settings).items, THEIRS["pro"][str(shots)])


def test_mmlu_redux_is_item_equal(data):
    settings = EvalSettings(tasks=("mmlu_redux",), data_path={"mmlu_redux": str(data)})
    compare("mmlu_redux", read_questions(TASKS["mmlu_redux"], settings).items, THEIRS["redux"])


def test_both_run_on_a_model(data, tmp_path):
    results = evaluate_model(
        REFERENCE / "ours",
        tasks=["mmlu_pro", "mmlu_redux"],
        num_fewshot=1,
        limit=1,
        max_new_tokens=8,
        data_path={"mmlu_pro": str(data), "mmlu_redux": str(data)},
        output=tmp_path / "run",
    )["tasks"]
    assert [(results[name]["n"], results[name]["num_fewshot"]) for name in results] == [(3, 1), (3, 0)]
    rows = [json.loads(line) for line in (tmp_path / "run/samples_mmlu_pro.jsonl").read_text().splitlines()]
    assert sum(row["acc"] for row in rows) / 3 == results["mmlu_pro"]["acc"]


def test_without_data_both_say_where_to_get_it(tmp_path):
    for name in ("mmlu_pro", "mmlu_redux"):
        with pytest.raises(FileNotFoundError, match=f"is not shipped; pass --data {name}="):
            evaluate_model(REFERENCE / "ours", tasks=[name], output=tmp_path / "run")


@pytest.mark.slow
def test_the_stored_answers_are_still_the_harness_own(tmp_path, monkeypatch):
    import os

    python = os.environ.get("LM_EVAL_PYTHON")
    if not python:
        pytest.skip("LM_EVAL_PYTHON names no interpreter that has lm_eval 0.4.13")
    script = REFERENCE / "run_lm_eval_letters.py"
    subprocess.run([python, str(script), str(tmp_path / "fresh.json.gz")], check=True, capture_output=True)
    assert json.loads(gzip.decompress((tmp_path / "fresh.json.gz").read_bytes())) == THEIRS
