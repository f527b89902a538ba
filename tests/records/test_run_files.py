import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary

SETTINGS = {"seed": 3}
STRAY = (
    *("thesis.txt", "data.jsonl", "notes/today.md", "model/notes.txt", "model/photo.jpg", "checkpoints/best.ckpt"),
    *("plots/figure.pdf", ".git/HEAD", "model/.git/config", "src/main.py", "checkpoints/checkpoint-5/my_eval.csv"),
    *(".eval_results/notes.txt", "other_recipe.yaml", "model/train.py"),
)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with the hash of its content; a link as where it leads."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def make_run(path: Path) -> RunFolder:
    run = RunFolder.create(path, SETTINGS, command="pretrain")
    run.log({"step": 1})
    run.finish(Summary(stage="pretrain"))
    return run


@pytest.mark.parametrize("name", STRAY)
def test_a_file_that_no_run_writes_keeps_the_whole_folder(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run.path / name).parent.mkdir(parents=True, exist_ok=True)
    (run.path / name).write_text("years of work")
    before = snapshot(tmp_path)
    with pytest.raises(FileExistsError) as caught:
        RunFolder.create(run.path, {"seed": 9}, command="pretrain", overwrite=True)
    assert "which no run writes, so nothing was deleted" in str(caught.value) and "\n" not in str(caught.value)
    after = snapshot(tmp_path)
    after.pop("run/.lock", None)
    assert after == before


def test_a_link_is_neither_followed_nor_deleted(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "model.safetensors").write_text("weights")
    (run.path / "model").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="holds model, which no run writes"):
        RunFolder.create(run.path, SETTINGS, command="pretrain", overwrite=True)
    assert (run.path / "model" / "model.safetensors").read_text() == "weights"


@pytest.mark.parametrize(
    "files",
    [
        {"recipe.yaml": "bread: flour"},
        {"recipe.yaml": "bread: flour", "environment.json": '{"name": "kitchen"}'},
        {"recipe.yaml": "bread: flour", "environment.json": "{}", "summary.json": "{}"},
        {"recipe.yaml": "bread: flour", "environment.json": '{"command": "bake", "versions": {}}'},
        {"environment.json": '{"command": "pretrain", "versions": {"python": "3"}}'},
    ],
)
def test_files_of_a_users_own_with_our_names_are_kept(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = snapshot(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match="holds no run of ours; pass another --output"):
            RunFolder.create(tmp_path, SETTINGS, command="pretrain", overwrite=overwrite)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("where", [".", "..", "below"])
def test_the_working_directory_is_kept(tmp_path, monkeypatch, where):
    run = make_run(tmp_path / "run")
    (run.path / "plots" / "deep").mkdir(parents=True)
    monkeypatch.chdir(run.path / "plots" / "deep" if where == "below" else run.path / "plots")
    monkeypatch.chdir(run.path) if where == "." else None
    before = snapshot(run.path)
    target = {".": ".", "..": "..", "below": run.path}[where]
    with pytest.raises(FileExistsError, match="holds the working or the home directory"):
        RunFolder.create(target, SETTINGS, command="pretrain", overwrite=True)
    assert snapshot(run.path) | {".lock": ""} == before | {".lock": ""}


def test_a_run_of_every_stage_is_replaced_whole(demo_run):
    """What the stages of a real run write, weights, tokenizer and code of the model among it, is all known as ours."""
    for name in ("pretrain", "adapt", "align", "evaluate"):
        path = demo_run / name
        checkpoint = path / "checkpoints" / "checkpoint-10"
        checkpoint.mkdir(parents=True)
        for file in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "trainer_state.json"):
            (checkpoint / file).write_bytes(b"x")
        (checkpoint / "pytorch_model_fsdp_0").mkdir()
        (checkpoint / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
        (path / "samples_mmlu.partial.jsonl").write_text("{")
        fresh = RunFolder.create(path, {"seed": 9}, command=name, overwrite=True)
        assert {file.name for file in path.iterdir()} == {"recipe.yaml", "environment.json", ".lock"}
        assert fresh.settings == {"seed": 9} and not fresh.is_resumed


HOLD = """
import sys, time
from deepseek_records.run_folder import RunFolder
run = RunFolder.create(sys.argv[1], {"seed": 3}, command="pretrain")
run.log({"step": 1})
print("begun", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_second_process_is_told_who_writes_and_the_lock_ends_with_its_owner(tmp_path, end):
    path = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as first:
        assert first.stdout.readline() == b"begun\n"
        for overwrite in (False, True):
            message = rf"is being written by process {first.pid} on .*; wait until it ends"
            with pytest.raises(FileExistsError, match=message) as caught:
                RunFolder.create(path, SETTINGS, command="pretrain", overwrite=overwrite)
            assert "\n" not in str(caught.value)
        first.send_signal(end)
        first.wait()
    assert RunFolder.create(path, SETTINGS, command="pretrain").is_resumed


def test_one_process_takes_its_own_run_up_again(tmp_path):
    first = RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain")
    first.log({"step": 1})
    assert RunFolder.create(tmp_path / "run", SETTINGS, command="pretrain").is_resumed
    first.finish(Summary(stage="pretrain"))
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_resumed_run_holds_to_the_content_it_was_begun_with(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS, command="adapt")
    run.hold_to(data="a" * 64, model="b" * 64)
    run.log({"step": 1})
    again = RunFolder.create(tmp_path / "run", SETTINGS, command="adapt")
    again.hold_to(data="a" * 64, model="b" * 64, tokenizer="c" * 64)
    assert again.inputs == {"data": "a" * 64, "model": "b" * 64, "tokenizer": "c" * 64}
    for name in ("data", "model", "tokenizer"):
        message = f"was begun with another content of {name} .hash {again.inputs[name][:12]} then, {'d' * 12} now"
        with pytest.raises(FileExistsError, match=message) as caught:
            again.hold_to(**{name: "d" * 64})
        assert "\n" not in str(caught.value)
    assert yaml.safe_load((run.path / "recipe.yaml").read_text()) == SETTINGS
