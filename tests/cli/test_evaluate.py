"""The evaluate command: what it writes and prints, and one line for whatever cannot be run."""

import base64
import gzip
import json
import re
from pathlib import Path

import pytest

from deepseek_cli.evaluate import name_models
from deepseek_cli.main import main
from deepseek_records.run_folder import RunFolder

pytestmark = pytest.mark.xdist_group("harness")
MODEL = str(Path(__file__).resolve().parents[1] / "eval/reference/ours")


def test_a_run_ends_with_table_files_and_a_report_of_every_item(tmp_path, capsys):
    words = ["--tasks", "mmlu,humaneval", "--limit", "mmlu=1,humaneval=2", "--max-new-tokens", "8"]
    assert main(["evaluate", MODEL, *words, "--output", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^mmlu +acc +0\.\d{4} ", printed, re.MULTILINE)
    assert re.search(r"^humaneval +pass@1 +0\.\d{4} ", printed, re.MULTILINE)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        *("recipe.yaml", "environment.json", "inputs.json", "summary.json", "results.json", "report.html"),
        *("samples_mmlu.jsonl", "samples_humaneval.jsonl", "prompts_mmlu.jsonl.gz", "prompts_humaneval.jsonl.gz"),
    }
    html = (tmp_path / "run/report.html").read_text()
    data = re.search(r'<script id="items-data"[^>]*>([^<]+)</script>', html)[1]
    tasks = {task["name"]: task["items"] for task in json.loads(gzip.decompress(base64.b64decode(data)))}
    assert (len(tasks["mmlu"]), len(tasks["humaneval"])) == (57, 2)
    assert all(item["prompt"].endswith("Answer:") for item in tasks["mmlu"])
    assert tasks["humaneval"][0]["prompt"].startswith("from typing import List")
    assert "0.871 (5-shot)" in html and "0.652 (0-shot)" in html


def test_several_models_get_a_folder_each_and_one_table(tmp_path, capsys):
    words = [
        MODEL,
        MODEL.replace("ours", "llama"),
        "--tasks",
        "mmlu",
        "--limit",
        "1",
        "--output",
        str(tmp_path / "all"),
    ]
    assert main(["evaluate", *words]) == 0
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0].strip(): line for line in printed.splitlines()}
    folders = [tmp_path / "all" / name for name in ("ours", "llama")]
    values = [RunFolder(folder).summary.results[0].value for folder in folders]
    cells = [line for name, line in lines.items() if name.startswith("MMLU")]
    assert len(cells) == 1 and all(f"{value:.4f} [" in cells[0] for value in values)
    assert all((folder / "report.html").is_file() for folder in folders)
    assert all(str(folder) in printed for folder in folders)
    # a second call is refused before anything is scored or deleted
    assert main(["evaluate", *words]) == 2
    assert f"output: {folders[0]} holds a finished run" in capsys.readouterr().err
    assert main(["evaluate", *words[:2], "--tasks", "mmlu", "--output", str(folders[0])]) == 2
    assert f"output: {folders[0]} holds a run, expected a folder for several" in capsys.readouterr().err
    assert main(["evaluate", MODEL, "./nowhere", "--tasks", "mmlu", "--output", str(tmp_path / "new")]) == 2
    assert "model: './nowhere' does not exist" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_names_of_models():
    models = ["a/one", "b/one/", "runs/first/model", "org/one", "first"]
    assert name_models(models) == ["one", "one-2", "first", "one-3", "first-2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((MODEL, "--tasks", "mmul"), "tasks: got 'mmul', expected one of"),
        ((MODEL, "--tasks", "mmlu", "--num-fewshot", "9"), "num_fewshot: got 9 for mmlu, expected 0 to 5"),
        ((MODEL, "--tasks", "mmlu", "--limit", "0"), "limit: got 0, expected 1 or more"),
        ((MODEL, "--tasks", "mmlu", "--limit", "few"), "limit: 'few', expected a number"),
        ((MODEL, "--tasks", "mmlu", "--batch-size", "0"), "batch_size: got 0, expected 1 or more"),
        ((MODEL, "--tasks", ","), "--tasks: got no name"),
        (("./nowhere", "--tasks", "mmlu"), "model: './nowhere' does not exist"),
        (("--tasks", "mmlu"), "give one of MODEL, --samples FILE, --compare RUN RUN and --table RUN ..."),
        (("--samples", "nowhere.jsonl", "--tasks", "humaneval"), "samples: nowhere.jsonl does not exist"),
        (("--samples", "nowhere.jsonl"), "tasks: mmlu,humaneval with --samples, expected exactly one"),
        ((MODEL, "--tasks", "mmlu", "--prompt-style", "chat"), "has no chat template; use base"),
        ((MODEL, "--tasks", "mmlu", "--apply_chat_template"), "has no chat template; use base"),
        ((MODEL, "--tasks", "winobias", "--apply-chat-template"), "task winobias has base only"),
        (
            ("--samples", "nowhere.jsonl", "--tasks", "humaneval", "--num-samples", "5", "--num-fewshot", "0"),
            "--num-fewshot, --num-samples: without effect with --samples, which runs no model",
        ),
        (("--compare", MODEL, MODEL, "--tasks", "mmlu"), "--tasks, --output: without effect with --compare"),
    ],
)
def test_what_cannot_be_run_is_told_in_one_line(tmp_path, words, message, capsys):
    assert main(["evaluate", *words, "--output", str(tmp_path / "run")]) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert [line for line in printed.splitlines() if "Loading weights" not in line][-1].startswith(
        "deepseek-moe evaluate: error: "
    )
    assert "Traceback" not in printed
