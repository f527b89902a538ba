"""Several runs in one table: intervals, the spread over seeds, dashes, and what differs."""

import pytest

from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Result, Summary


def make(path, rows, *, seed, command="evaluate", **settings):
    run = RunFolder.create(path, settings, command=command, seed=seed)
    run.hold_to(questions_of_mmlu=settings.get("data", "same"))
    run.finish(Summary(stage=command, results=tuple(rows)))
    return str(path)


def accuracy(value):
    return Result(metric="acc", value=value, stderr=0.0, n=57, is_share=True, task="mmlu", label="MMLU")


def test_runs_over_seeds_stand_beside_another_recipe(tmp_path, capsys):
    first = make(tmp_path / "a", [accuracy(1.0)], seed=0, lr=0.1)
    second = make(tmp_path / "b", [accuracy(0.5)], seed=1, lr=0.1)
    bits = Result(metric="bits_per_byte", value=2.0, stderr=0.1, dataset="books")
    before = Result(metric="bits_per_byte", value=9.0, dataset="books", when="before")
    third = make(tmp_path / "c", [before, bits], seed=0, lr=0.2, command="pretrain", data="other")
    assert main(["evaluate", "--table", first, second, third]) == 0
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in printed.splitlines()}
    assert "1.0000 [0.9369, 1.0000]" in lines["MMLU, acc"] and lines["MMLU, acc"].endswith("0.7500 (0.3536)")
    assert "2.0000 [1.8040, 2.1960]" in lines["books, bits_per_byte"] and "9.0" not in printed
    assert lines["books, bits_per_byte"].split()[2:4] == ["-", "-"]
    assert "mean (sd) of runs 1, 2" in lines["figure"]
    assert "lr: 0.1 | 0.1 | 0.2" in printed
    assert "mmlu: not the same prompts in all runs (questions or shots)" in printed


def test_an_unfinished_run_is_told_in_one_line(tmp_path, capsys):
    RunFolder.create(tmp_path / "begun", {}, command="evaluate", seed=0)
    assert main(["evaluate", "--table", str(tmp_path / "begun")]) == 2
    assert "has no summary.json" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--tasks", "mmlu"], ["--batch-size", "2"]])
def test_options_of_an_evaluation_are_refused(tmp_path, words, capsys):
    assert main(["evaluate", "--table", str(tmp_path), *words]) == 2
    assert f"{words[0]}: without effect with --table, which runs no model" in capsys.readouterr().err
