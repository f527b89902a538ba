"""The data command: what it searches for, and that its table says what was done."""

import json
import re

import pytest

pytest.importorskip("ftfy", reason="pip install 'deepseek-moe[data]'")

from deepseek_cli.data import collect_benchmarks
from deepseek_cli.main import main
from deepseek_eval.tasks.catalogue import TASKS
from deepseek_records.run_folder import RunFolder
from deepseek_training.data.texts import load_texts
from deepseek_training.recipes.data import DataRecipe

SOURCES = [{"path": "medicine"}]


def test_every_task_is_searched_for_or_named(capsys):
    found = collect_benchmarks(DataRecipe(sources=SOURCES))
    told = capsys.readouterr().out
    shared = {name for name, task in TASKS.items() if task.shares_answers_with in TASKS}
    assert all((name in found) != (name in re.findall(r"\w+", told)) for name in set(TASKS) - shared)
    assert {"mmlu", "humaneval", "mbpp", "winobias", "bbq", "refusal"} <= set(found)
    texts = dict(found["humaneval"])
    assert "HumanEval/0/solution" in texts and "HumanEval/0/tests" in texts
    assert not any("\nA. " in text for _, text in found["mmlu"] if len(text.partition("\nA. ")[0].split()) > 12)


def test_a_task_that_is_named_must_have_its_data():
    with pytest.raises(FileNotFoundError, match="crows_pairs"):
        collect_benchmarks(DataRecipe(sources=SOURCES, benchmarks=["crows_pairs"]))
    with pytest.raises(ValueError, match=r"^benchmarks: got digits, expected tasks of text"):
        collect_benchmarks(DataRecipe(sources=SOURCES, benchmarks=["digits"]))
    with pytest.raises(ValueError, match="tasks: got 'mmul', expected one of"):
        collect_benchmarks(DataRecipe(sources=SOURCES, benchmarks=["mmul"]))


def test_the_command_prints_what_each_filter_did(tmp_path, capsys):
    rows = [{"text": f"Sentence number {number} of a small file."} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    words = [
        "data",
        "data-debug",
        "--sources",
        f"[{{path: {tmp_path / 'a.jsonl'}}}]",
        "--output",
        str(tmp_path / "run"),
    ]
    words += ["--sources", f"[{{path: {tmp_path}/a.jsonl}}]", "--filters", "[repair, duplicates]", "--languages", "[]"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "exact duplicates" in told and f"data in {tmp_path / 'run'}/data" in told
    assert main(words) == 2 and "finished run" in capsys.readouterr().err
    assert main([*words, "--workers", "0"]) == 2


@pytest.mark.slow
def test_what_was_cleaned_is_trained_on_and_named_in_the_models_card(tmp_path, capsys):
    """The three commands as the page has them: clean, pretrain on the result, write the model's card."""
    texts = load_texts("medicine", "all")[:400]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0]]))
    clean, first = tmp_path / "clean", tmp_path / "first"
    source = f"[{{path: {tmp_path}/a.jsonl, license: CC BY 4.0, url: https://example.org/a}}]"
    words = ["data", "data-debug", "--sources", source, "--languages", "[]", "--output", str(clean)]
    assert main([*words, "--filters", "[repair, personal_data, duplicates]"]) == 0
    capsys.readouterr()
    assert main(["pretrain", "pretrain-debug", "--data", str(clean), "--output", str(first)]) == 2
    told = capsys.readouterr().err.strip()
    assert told.endswith(f"data: got the run folder {clean}, expected its data; pass {clean / 'data'}")
    assert "\n" not in told and not first.exists()
    assert main(["pretrain", "pretrain-debug", "--data", str(clean / "data"), "--output", str(first)]) == 0
    trained = RunFolder(first).summary.data[0]
    kept = sum(use.num_rows for use in RunFolder(clean).summary.data if use.split == "train")
    assert trained.num_rows == kept and trained.license == "CC BY 4.0" and trained.cleaning is not None
    assert main(["card", str(first)]) == 0
    card = (first / "README.md").read_text()
    assert "[data card](../clean/README.md)" in card and f"| a | train | {kept} |" in card
    assert "| CC BY 4.0 | https://example.org/a |" in card and "| exact duplicates | 401 | 1 | 400 |" in card
