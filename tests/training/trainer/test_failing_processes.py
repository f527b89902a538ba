"""One process of two dies, hangs or goes astray: the other says so in one line, and the run can go on."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from deepseek_records.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

WORKER = str(Path(__file__).parents[1] / "failing_worker.py")
CLOCKED = {"tokens_per_second", "peak_memory_gib", "mfu"}


@pytest.fixture(scope="module")
def settings(tiny_settings):
    model = {"router_bias_update_speed": 0.01, "seq_aux_loss_coef": 0.1}
    return {**tiny_settings, "model": model, "batch_size": 4, "save_steps": 2, "logging_steps": 2}


def launch(settings, output, program, *, restarts=0, **environment):
    """Exit code, what was printed to stderr, and seconds."""
    recipe = output.parent / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    command = [sys.executable, *launcher, *program, "pretrain", str(recipe), "--output", str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    return done.returncode, done.stderr, time.monotonic() - started


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "run"
    code, stderr, _ = launch(settings, path, ["-m", "deepseek_cli.main"])
    assert code == 0, stderr[-3000:]
    return RunFolder(path)


def told(stderr):
    return [line for line in stderr.splitlines() if "deepseek-moe pretrain: error:" in line]


def assert_ends_like(whole, path):
    rows = [
        [{k: v for k, v in row.items() if k not in CLOCKED} for row in r.metrics] for r in (whole, RunFolder(path))
    ]
    assert rows[0] == rows[1]
    expected, found = (load_file(p / "model" / "model.safetensors") for p in (whole.path, path))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_killed_process_is_told_of_and_the_run_goes_on(settings, whole, tmp_path):
    code, stderr, _ = launch(settings, tmp_path / "run", [WORKER], FAULT="kill", FAULT_STEP="6")
    (line,) = told(stderr) or [stderr[-3000:]]
    assert code != 0 and "process 0 of 2 was left alone in step 6, another is gone; the same command goes on" in line
    code, stderr, _ = launch(settings, tmp_path / "run", ["-m", "deepseek_cli.main"])
    assert code == 0, stderr[-3000:]
    assert_ends_like(whole, tmp_path / "run")


def test_a_process_that_hangs_is_told_of_in_time(settings, tmp_path):
    late = {**settings, "collective_timeout_s": 20}  # a busy machine starts one process after the other
    code, stderr, seconds = launch(late, tmp_path / "run", [WORKER], FAULT="hang", FAULT_STEP="4")
    (line,) = told(stderr) or [stderr[-3000:]]
    assert code != 0 and "process 0 of 2 was left alone in step 4, process 1 (last seen in model.layers.1 of " in line
    assert "of step 4) did not come within 20 s; the same command goes on" in line
    assert seconds < 120


def test_the_process_whose_numbers_burst_first_is_named(settings, tmp_path):
    code, stderr, _ = launch(settings, tmp_path / "run", [WORKER], FAULT="nan", FAULT_STEP="5")
    assert code != 0
    for line in told(stderr):
        assert "first in the output of model.layers.1 in process 1 at step 5" in line
    assert told(stderr)


def test_ten_deaths_change_nothing(settings, whole, tmp_path):
    """torchrun starts all processes again; each time they go on from the last complete checkpoint."""
    deaths = tmp_path / "deaths"
    environment = {"FAULT": "deaths", "DEATHS": "10", "DEATH_FILE": str(deaths)}
    code, stderr, _ = launch(settings, tmp_path / "run", [WORKER], restarts=12, **environment)
    assert code == 0, stderr[-3000:]
    assert deaths.read_text() == "x" * 10
    assert_ends_like(whole, tmp_path / "run")


@pytest.mark.parametrize(("fault", "what"), [("slow", "its layers' attention"), ("slow_data", "reading its data")])
def test_a_slow_process_is_named_once(fault, what, settings, tmp_path):
    """All steps take as long in both processes; 30 ms are lost in each layer's attention, or with each row."""
    code, stderr, _ = launch({**settings, "max_steps": 8}, tmp_path / "run", [WORKER], FAULT=fault)
    assert code == 0, stderr[-3000:]
    (line,) = [line for line in stderr.splitlines() if "is slow" in line]
    found = re.search(r"process 1 is slow: ([\d.]+) times the others' time for (.*) in steps 3 to 4 ", line)
    assert found and float(found[1]) > 1.5 and found[2] == what
