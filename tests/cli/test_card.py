import argparse
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard
from printed_commands import run_all_that_it_prints

from deepseek_cli import card
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Benchmark, Result, Summary


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    card.add_arguments(parser)
    return parser.parse_args(words)


@pytest.fixture
def evaluated(tmp_path):
    run = RunFolder.create(tmp_path / "demo" / "evaluate", {"model": "fox"}, command="evaluate", seed=1)
    benchmark = Benchmark(hub_id="cais/mmlu", name="MMLU", task_id="mmlu_all")
    row = Result(metric="acc", dataset="mmlu", split="test", value=0.25, stderr=0.04, n=114, benchmark=benchmark)
    run.finish(Summary(stage="evaluate", results=(row,), seconds=3))
    return tmp_path / "demo"


def test_card_and_report_are_written_and_the_table_is_printed(evaluated, capsys):
    assert card.run(parse(str(evaluated), "--repo-id", "someone/fox", "--license", "mit")) == 0
    printed = capsys.readouterr().out
    assert "0.250 \u00b1 0.040" in printed and str(evaluated / "report.html") in printed
    loaded = ModelCard.load(evaluated / "README.md")
    assert loaded.data.license == "mit" and loaded.data.model_name == "fox"
    assert (evaluated / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert yaml.safe_load((evaluated / ".eval_results" / "mmlu.yaml").read_text())[0]["value"] == 0.25


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run"):
        card.run(parse(str(tmp_path)))


@pytest.mark.parametrize("name", ["not an id", "a/b/c", "someone/"])
def test_a_name_that_the_hub_would_refuse(evaluated, name):
    with pytest.raises(ValueError, match=f"repo_id: got '{name}', expected user/name"):
        card.run(parse(str(evaluated), "--repo-id", name))
    assert not (evaluated / "README.md").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("demo")
def test_all_that_the_demos_card_prints_runs(demo_folder, tmp_path):
    """Python blocks, and the command that measures the benchmarks again: its figures are the card's."""
    demo = shutil.copytree(demo_folder / "runs" / "demo", tmp_path / "demo")
    readme = demo / "README.md"
    ran = run_all_that_it_prints(readme)
    assert len(ran) == 3 and "deepseek-moe evaluate ./align/model --tasks mmlu,humaneval --limit" in ran[-1]
    again = {(row.task, row.value, row.n) for row in RunFolder(demo / "measured-again").summary.results}
    assert again == {(row.task, row.value, row.n) for row in RunFolder(demo / "evaluate").summary.results}


@pytest.mark.xdist_group("demo")
def test_a_stage_of_the_demo_has_a_card_of_its_own(demo_folder, tmp_path):
    """Pretrained only: no word of what came later, and what it prints runs."""
    run = shutil.copytree(demo_folder / "runs" / "demo" / "pretrain", tmp_path / "pretrain")
    assert card.run(parse(str(run))) == 0
    text = (run / "README.md").read_text()
    assert "It was pretrained from scratch on `books`." in text and "fine-tuned" not in text and "reward" not in text
    assert len(run_all_that_it_prints(run / "README.md")) == 2
