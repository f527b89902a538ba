"""A task of one's own from a file of rows and a few lines of YAML, without touching the package."""

import json
from pathlib import Path

import pytest

from deepseek_cli.main import main
from deepseek_eval.tasks.catalogue import find_task
from deepseek_model_cards.card.card import write_card
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
MODEL = str(Path(__file__).resolve().parents[1] / "reference/ours")
CHOICE = """name: capitals
label: Capitals
kind: choice
data: capitals.csv
prompt: "The capital of {country} is"
choices: [first, second]
answer: right
license: CC0-1.0
"""
GENERATION = """name: sums
kind: generation
data: sums.jsonl
prompt: "{question}\\nAnswer:"
answer: answer
max_new_tokens: 4
"""


@pytest.fixture
def files(tmp_path):
    (tmp_path / "capitals.csv").write_text("country,first,second,right\nFrance,Paris,Rome,Paris\nItaly,Paris,Rome,1\n")
    (tmp_path / "capitals.yaml").write_text(CHOICE)
    (tmp_path / "sums.jsonl").write_text(json.dumps({"question": "2 + 2?", "answer": "4"}) + "\n")
    (tmp_path / "sums.yaml").write_text(GENERATION)
    return tmp_path


def test_both_kinds_run_and_show_up(files, capsys):
    tasks = f"{files / 'capitals.yaml'},{files / 'sums.yaml'}"
    assert main(["evaluate", MODEL, "--tasks", tasks, "--output", str(files / "run")]) == 0
    assert "capitals " in capsys.readouterr().out
    summary = RunFolder(files / "run").summary
    assert [(row.task, row.label, row.n, row.benchmark) for row in summary.results] == [
        ("capitals", "Capitals", 2, None),
        ("sums", "sums", 1, None),
    ]
    assert [(data.name, data.license) for data in summary.data] == [
        ("capitals.csv", "CC0-1.0"),
        ("sums.jsonl", "not stated"),
    ]
    rows = [json.loads(line) for line in (files / "run/samples_capitals.jsonl").read_text().splitlines()]
    assert [row["target"] for row in rows] == [0, 1]
    card = write_card(files / "run", output=files / "card").read_text()
    assert (
        "| Capitals | accuracy |" in card and "--tasks capitals" not in card
    )  # That command would not run elsewhere.


def test_texts_are_compared_without_case_and_spaces(files):
    task = find_task(str(files / "sums.yaml"))
    rows = [{"prediction": text, "target": "Four"} for text in (" four\n", "Four.", "")]
    assert task.metric_inputs([], rows)["predictions"] == [0, -1, -1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: choice", "kind: essay", "kind: got 'essay', expected choice or generation"),
        ("name: capitals", "name: mmlu", "name: got 'mmlu', expected a name that no other task has"),
        ("name: capitals", "name: ../x", "name: got '../x', expected small letters"),
        ("answer: right", "answers: right", "got the unknown key 'answers'"),
        ("answer: right", "answer: wrong", "capitals.csv, line 2: wrong: got no wrong, expected a choice's text"),
        ("{country}", "{land}", "capitals.csv, line 2: land: got no land, expected a column that the prompt names"),
        ("choices: [first, second]", "choices: [first]", "choices: got ['first'], expected a column, or a list"),
        ("data: capitals.csv", "data: no.csv", "no.csv does not exist"),
        ("name: capitals", "name: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(files, old, new, message, capsys):
    path = files / "capitals.yaml"
    path.write_text(CHOICE.replace(old, new))
    assert main(["evaluate", MODEL, "--tasks", str(path), "--output", str(files / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("deepseek-moe evaluate: error: ")
