"""The demo at debug size: every stage writes, the card and report stand, and an interruption changes no figure."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

# Loaded by path: pytest's importlib mode gives conftest no importable name.
from run_deepseek_moe import COMMAND, ENVIRONMENT, run_command

STAGES = ("pretrain", "adapt", "sft", "align", "evaluate")
pytestmark = pytest.mark.xdist_group("demo")


def figures(root: Path) -> dict:
    """Every stage's results; seconds and rates differ between runs, nothing else may."""
    return {stage: json.loads((root / stage / "summary.json").read_text())["results"] for stage in STAGES}


def test_every_stage_and_both_pages_are_written(demo_folder):
    root = demo_folder / "runs" / "demo"
    for stage in STAGES:
        summary = json.loads((root / stage / "summary.json").read_text())
        assert summary["results"], stage
    assert (root / "align" / "model" / "model.safetensors").stat().st_size > 100_000
    assert (root / "README.md").read_text().startswith("---\n")
    report = (root / "report.html").read_text()
    assert 'src="http' not in report and 'href="http' not in report.split("<body")[0]


def test_the_table_names_every_bar(demo_folder):
    printed = (demo_folder / "stdout.txt").read_text()
    for stage in STAGES:
        for check in json.loads((demo_folder / "runs/demo" / stage / "summary.json").read_text())["checks"]:
            assert check["name"] in printed
    assert "chance" in printed


@pytest.mark.slow
def test_a_second_run_repeats_no_stage(demo_folder):
    before = figures(demo_folder / "runs/demo")
    done = run_command("demo", "--size", "debug", cwd=demo_folder)
    assert done.returncode == 0
    assert done.stdout.count("done before") == len(STAGES)
    assert figures(demo_folder / "runs/demo") == before


def test_a_demo_of_another_size_is_not_overwritten(demo_folder):
    done = run_command("demo", cwd=demo_folder)
    assert done.returncode == 2
    assert "holds a demo of size debug" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        pytest.param("pretrain", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("adapt", signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param("align", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("evaluate", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_demo_ends_with_the_same_figures(demo_folder, tmp_path, stage, how):
    # Stages before the interrupted one are taken from the whole run: they are the same files by construction.
    root = tmp_path / "runs" / "demo"
    root.parent.mkdir()
    subprocess.run(["cp", "-r", str(demo_folder / "runs/demo"), str(root)], check=True)
    for later in STAGES[STAGES.index(stage) :]:
        subprocess.run(["rm", "-r", str(root / later)], check=True)
    process = subprocess.Popen(
        [str(COMMAND), "demo", "--size", "debug"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A suite that runs in the background may ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (root / stage / "recipe.yaml").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2 if stage == "align" else 1.0)  # At debug size PPO takes about a second.
    os.killpg(process.pid, how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (root / stage / "summary.json").exists()
    if how == signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in errors
    done = run_command("demo", "--size", "debug", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was interrupted, goes on" in done.stdout
    assert figures(root) == figures(demo_folder / "runs/demo")
