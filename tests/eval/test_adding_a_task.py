"""A task is one file of data and formatting and one line in the catalogue; all that shows it reads what it says."""

import importlib.util
import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from deepseek_cli.main import main
from deepseek_eval.tasks import catalogue
from deepseek_model_cards.card.card import write_card
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
REFERENCE = Path(__file__).resolve().parent / "reference"
TASK_FILE = '''
"""Capitals: which city is the capital?"""

from deepseek_eval.tasks.task import ChoiceItem, DataSet, Figure, Task
from deepseek_records.results import Published

ROWS = (("France", "Paris"), ("Italy", "Rome"), ("Peru", "Lima"), ("Kenya", "Nairobi"))


def build_items(num_fewshot, limit, data_path):
    """Yield the questions."""
    for index, (country, city) in enumerate(ROWS[:limit]):
        yield ChoiceItem(
            id=f"capitals/{index}",
            prompt=f"The capital of {country} is",
            choices=tuple(f" {other}" for _, other in ROWS),
            target=index,
            group="world",
        )


TASK = Task(
    name="capitals",
    kind="continuation",
    build_items=build_items,
    data=DataSet(
        name="someone/capitals", label="Capitals", split="test", license="CC0-1.0", source="here", num_questions=4
    ),
    figures=(
        Figure(
            "acc",
            "share of right cities",
            chance=0.25,
            is_share=True,
            published=(Published(by="a geographer", value=0.99, remark="closed book"),),
        ),
    ),
    measures="knowledge",
    does_not_show="Whether the model has ever left the house.",
)
'''


@pytest.fixture
def capitals(tmp_path, monkeypatch):
    """The task's one file, and its line in the catalogue."""
    path = tmp_path / "capitals.py"
    path.write_text(TASK_FILE)
    spec = importlib.util.spec_from_file_location("capitals", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(catalogue.TASKS, "capitals", module.TASK)
    return module.TASK


def test_the_harness_the_table_the_card_and_the_report_show_it(capitals, tmp_path, capsys):
    words = ["--tasks", "capitals", "--dtype", "float32", "--output", str(tmp_path / "run")]
    assert main(["evaluate", str(REFERENCE / "ours"), *words]) == 0
    answers = [json.loads(line) for line in (tmp_path / "run/samples_capitals.jsonl").read_text().splitlines()]
    accuracy = sum(answer["acc"] for answer in answers) / len(answers)
    assert len(answers) == 4

    table = capsys.readouterr().out
    line = next(line for line in table.splitlines() if line.startswith("capitals "))
    assert line.split()[:3] == ["capitals", "acc", f"{accuracy:.4f}"]
    assert "- capitals: Whether the model has ever left the house." in table

    (row,) = RunFolder(tmp_path / "run").summary.results
    assert (row.label, row.measures, row.chance, row.higher_is_better) == ("Capitals", "knowledge", 0.25, True)

    card = write_card(tmp_path / "run", output=tmp_path / "card").read_text()
    assert "| Capitals, test | share of right cities |" in card.partition("## Benchmarks")[2]
    assert "knowledge (MMLU and the like)" not in card.partition("## Not measured")[2]
    (result,) = ModelCard(card).data.eval_results
    assert (result.dataset_name, result.metric_value) == ("Capitals", accuracy)
    assert not (tmp_path / "card/.eval_results").exists()

    report = (tmp_path / "run/report.html").read_text()
    assert all(words in report for words in ("Capitals, share of right cities", "a geographer", "0.990 (closed book)"))


def test_a_safety_task_is_shown_with_the_others(capitals, tmp_path, monkeypatch):
    from dataclasses import replace

    task = replace(capitals, is_safety=True, measures="bias", label="Bias of capitals")
    monkeypatch.setitem(catalogue.TASKS, "capitals", task)
    words = ["--tasks", "capitals", "--limit", "2", "--dtype", "float32", "--output", str(tmp_path / "run")]
    assert main(["evaluate", str(REFERENCE / "ours"), *words]) == 0
    card = write_card(tmp_path / "run", output=tmp_path / "card").read_text()
    section = card.partition("## Bias and safety")[2].partition("\n## ")[0]
    assert "share of right cities | Bias of capitals, partial: 2 of 4, test" in section
    assert "Whether the model has ever left the house." in section
    assert "social bias" not in card.partition("## Not measured")[2]
