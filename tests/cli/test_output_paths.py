"""Where the result is to go, for every command that writes: a file in the way, a place that cannot be written."""

import json
from pathlib import Path

import pytest

from deepseek_cli.bench import BENCHMARKS
from deepseek_cli.main import main
from deepseek_records.output_paths import check_output, make_output

MODEL = str(Path(__file__).resolve().parents[1] / "eval/reference/ours")
FOREIGN = str(Path(__file__).resolve().parents[1] / "eval/reference/v3")
OF_A_MODEL = ("serving", "edge", "smaller")  # benchmarks
STAGES = ("pretrain", "adapt", "sft", "align", "dpo", "grpo")
ONE_FILE = {
    "plan": (["plan", "7.7b", "--gpus", "64", "--gpu", "h200"], "--json"),
    "launch": (["launch", "pretrain-debug", "--output", "out"], "--file"),
}
# The words before the output's path.
COMMANDS = {
    **{
        name: [name, f"{name}-debug", *(["--model", MODEL] if name != "pretrain" else []), "--output"]
        for name in STAGES
    },
    "data": ["data", "data-debug", "--output"],
    "distill": ["distill", "distill-debug", "--teacher", MODEL, "--output"],
    "shrink": ["shrink", MODEL, "--set", "n_routed_experts=4", "--"],
    "upcycle": ["upcycle", MODEL.replace("ours", "llama"), "--"],
    "quantize": ["quantize", MODEL, "--group", "16", "--"],
    "demo, dry": ["demo", "--dry-run", "--output"],
    "data, dry": ["data", "data-debug", "--dry-run", "--output"],
    "launch": ["launch", "pretrain-debug", "--output"],
    "demo": ["demo", "--size", "debug", "--output"],
    "evaluate": ["evaluate", MODEL, "--tasks", "mmlu", "--limit", "1", "--output"],
    "evaluate two": ["evaluate", MODEL, FOREIGN, "--tasks", "mmlu", "--limit", "1", "--output"],
    "card": ["card", MODEL, "--output"],
    "document": ["document", MODEL],
    "export": ["export", MODEL],
    "export gguf": ["export", MODEL, "--to", "gguf"],
    **{
        f"bench {one.name}": ["bench", one.name, *([MODEL] if one.name in OF_A_MODEL else []), "--output"]
        for one in BENCHMARKS
        if one.name != "rewards"
    },
    "bench rewards": ["bench", "rewards", "align-debug", "--model", MODEL, "--output"],
    "table": ["evaluate", "--table"],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "occupied"
    path.write_text("somebody's")
    return path


def error_of(words, capsys):
    capsys.readouterr()
    assert main(words) == 2, words
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("deepseek-moe ") and ": error: " in lines[-1]
    return lines[-1].partition(": error: ")[2]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_file_where_a_folder_is_needed(name, file, capsys):
    setting = "run" if name == "table" else "output"
    assert error_of([*COMMANDS[name], str(file)], capsys) == f"{setting}: got the file {file}, expected a folder"
    below = file / "below"
    told = error_of([*COMMANDS[name], str(below)], capsys)
    assert told.startswith(f"{setting}: ") and str(below) in told
    assert file.read_text() == "somebody's"


@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "evaluate",
        "card",
        "export",
        "bench step",
        "pretrain",
        "data",
        "distill",
        "shrink",
        "quantize",
        "upcycle",
    ],
)
@pytest.mark.parametrize("place", ["/proc/nothing/here", "zero\0byte", "x" * 300])
def test_a_place_that_cannot_be_written(name, place, capsys):
    assert error_of([*COMMANDS[name], place], capsys).startswith("output: got ")


@pytest.mark.parametrize("name", ONE_FILE)
def test_a_place_where_one_file_cannot_be_written(name, tmp_path, file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, option = ONE_FILE[name]
    wrong = {
        str(tmp_path): f"got the folder {tmp_path}, expected a file",
        str(file / "below"): f"got the file {file}, expected a folder",
        "/proc/nothing/here": "got /proc/nothing, expected a folder that can be written",
        "zero\0byte": "got zero\\0byte, expected a file's name without zero bytes",
        "x" * 300: "expected a file's name (File name too long)",
    }
    for place, told in wrong.items():
        assert main([*words, option, place]) == 2
        printed = capsys.readouterr()
        assert f"error: {option}: " in printed.err and told in printed.err and not printed.out, place
    assert file.read_text() == "somebody's" and list(tmp_path.iterdir()) == [file]
    assert main([*words, option, str(tmp_path / "a/b/c")]) == 0
    assert (tmp_path / "a/b/c").read_text()


def test_merge_and_a_folder_in_place_of_a_file(tmp_path, file, capsys):
    assert error_of(["merge", MODEL, str(file)], capsys) == f"output: got the file {file}, expected a folder"
    (tmp_path / "model.gguf").mkdir()
    told = error_of(["export", MODEL, str(tmp_path / "model.gguf"), "--to", "gguf"], capsys)
    assert told == f"output: got the folder {tmp_path / 'model.gguf'}, expected a file"


def test_an_absent_folder_is_made_and_left_empty(tmp_path):
    assert check_output(tmp_path / "a/b") == tmp_path / "a/b" and not (tmp_path / "a").exists()
    assert list(make_output(tmp_path / "a/b").iterdir()) == []


@pytest.mark.parametrize("words", [["card"], ["evaluate", "--table"], ["push"]])
def test_a_file_in_place_of_a_run(words, file, capsys):
    told = error_of([*words, str(file), *(["some/name", "--license", "mit"] if words == ["push"] else [])], capsys)
    assert str(file) in told


def test_a_folder_in_place_of_a_file(tmp_path, capsys):
    told = error_of(["evaluate", "--samples", str(tmp_path), "--tasks", "humaneval"], capsys)
    assert told == f"samples: {tmp_path} is a folder, expected a file of JSON lines"
    told = error_of(["pretrain", str(tmp_path)], capsys)
    assert told.startswith("recipe: ") and json.dumps(told)
