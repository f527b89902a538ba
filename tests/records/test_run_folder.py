import dataclasses
import json
import subprocess
import sys

import pytest

from deepseek_records.environment import describe_environment
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.summary import Summary
from deepseek_records.typed_json import to_json

SETTINGS = {"seed": 3, "model": "nano", "words": "na\u00efve"}


def test_a_run_reads_back_what_it_wrote(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain", seed=3)
    assert run.metrics == []  # a training of fewer steps than one line is logged for ends so
    run.log({"step": 1, "loss": 2.5})
    run.log({"step": 2, "loss": 2.25})
    assert not run.is_finished and not run.is_resumed
    finished = run.finish(Summary(stage="pretrain", seconds=1.5))
    assert finished.energy is not None and dataclasses.replace(finished, energy=None) == Summary(
        stage="pretrain", seconds=1.5
    )
    again = RunFolder(tmp_path / "run")
    assert again.is_finished
    assert again.settings == SETTINGS
    assert again.metrics == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}]
    assert again.summary == finished and not again.is_resumed
    assert again.environment.seed == 3 and again.environment.command == "pretrain"


def test_an_unfinished_run_is_taken_up_only_with_equal_settings(tmp_path):
    RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain").log({"step": 1})
    assert RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain").is_resumed
    with pytest.raises(FileExistsError, match=r"differs in seed.*--output") as error:
        RunFolder.create(tmp_path / "run", {**SETTINGS, "seed": 4}, command="pretrain")
    assert "\n" not in str(error.value)


def test_a_finished_run_is_kept_unless_told_to_overwrite(tmp_path):
    RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain").finish(Summary(stage="pretrain"))
    with pytest.raises(FileExistsError, match="finished run"):
        RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain")
    fresh = RunFolder.create(tmp_path / "run", {"seed": 9}, command="pretrain", overwrite=True)
    assert not fresh.is_finished and fresh.settings == {"seed": 9}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_kind_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no run of ours"):
        RunFolder.create(tmp_path, SETTINGS, command="pretrain", overwrite=overwrite)
    with pytest.raises(FileExistsError, match=r"got the file .*, expected a folder"):
        RunFolder.create(tmp_path / "thesis.txt", SETTINGS, command="pretrain", overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_metrics_line_cut_by_a_kill_is_left_out(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain")
    run.log({"step": 1})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics == [{"step": 1}]


def test_reading_a_folder_without_a_run_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no summary\.json"):
        _ = RunFolder(tmp_path).summary


def test_json_is_whole_or_absent_and_holds_no_nan(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"value": 1})
    with pytest.raises(ValueError, match=r"nan|NaN|Out of range"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1}


def test_a_writer_killed_midway_leaves_the_old_file(tmp_path):
    """The real thing: a process that dies between writing and renaming."""
    path = tmp_path / "summary.json"
    write_json(path, {"value": 1})
    code = (
        "import os, pathlib, deepseek_records.run_folder as r\n"
        "os.replace = lambda *a: os._exit(9)\n"
        f"r.write_json(pathlib.Path({str(path)!r}), {{'value': 2}})\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    assert json.loads(path.read_text()) == {"value": 1}


def test_the_environment_names_versions_and_machine_but_no_variable(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    environment = describe_environment("pretrain", 5)
    assert environment.versions["torch"].startswith("2.")
    assert environment.machine.num_cpus >= 1
    assert "hf_" + "a" * 30 not in json.dumps(to_json(environment))


def test_a_run_that_only_began_is_replaced(tmp_path):
    RunFolder.create(tmp_path / "run", {"k": 99}, command="pretrain")
    run = RunFolder.create(tmp_path / "run", {"k": 2}, command="pretrain")
    assert run.settings == {"k": 2} and not run.is_resumed
    run.log({"step": 1})
    with pytest.raises(FileExistsError, match="it differs in k"):
        RunFolder.create(tmp_path / "run", {"k": 3}, command="pretrain")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", b'{"stage": ', "summary.json: got no JSON (Expecting value"),
        ("summary.json", b"[]", "summary.json holds list, expected an object"),
        ("environment.json", b"\xff", "environment.json: got no JSON ('utf-8' codec"),
        ("recipe.yaml", b"a: [", "recipe.yaml: got no YAML"),
        ("recipe.yaml", b"- a", "recipe.yaml holds list, expected settings"),
        ("recipe.yaml", b"\xff", "recipe.yaml: got bytes that are not UTF-8 (byte 0)"),
        ("metrics.jsonl", b"[1]\n", "metrics.jsonl holds list in a line, expected objects"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    run = RunFolder.create(tmp_path / "run", {"a": 1}, command="test")
    run.log({"step": 1})
    run.finish(Summary(stage="test"))
    (run.path / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        _ = run.settings, run.environment, run.summary, run.metrics
    assert message in " ".join(str(caught.value).split())
