"""The script for whoever has a cluster, as far as two processes of a CPU can run it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from cluster_table import cost_of_saving

SCRIPT = Path(__file__).parents[3] / "dev" / "measure_on_cluster.sh"


def run(folder, *parts, **environment):
    command = ["bash", str(SCRIPT), str(folder), *parts]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_bash_reads_it():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize(
    ("parts", "environment", "message"),
    [
        (["stepz"], {}, "part: got stepz, expected exchange, alone, steps, saves or resume"),
        ([], {"PROCESSES": "1"}, "PROCESSES: got 1, expected at least 2 (DRY_RUN=1 starts two on the CPU)"),
    ],
)
def test_what_cannot_run_is_refused(parts, environment, message, tmp_path):
    done = run(tmp_path / "cluster", *parts, **environment)
    assert done.returncode == 2 and done.stderr.strip() == message and not (tmp_path / "cluster").exists()


def test_a_checkpoint_costs_what_stands_between_and_what_the_next_step_takes_longer():
    plain = {"steps": [1.0] * 6, "between": [0.1] * 5}
    saving = {"steps": [1.0, 1.0, 1.3, 1.0, 1.5, 1.0], "between": [0.1, 0.6, 0.1, 0.8, 0.1]}
    found = cost_of_saving(saving, plain, 2)
    assert found == pytest.approx({"stands_still_s": 0.6, "next_step_s": 0.4})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_goes_through(tmp_path):
    """One layout of each part; the stopped run's losses are those of one process."""
    done = run(tmp_path, DRY_RUN="1", ONLY="fsdp2_sharded")
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    runs = results["runs"]
    saving = {"fsdp2_sharded-saving", "fsdp2_sharded-saving-behind"}
    assert runs.keys() == {"alone", "alone-all-cores", "fsdp2_sharded", "fsdp2_sharded-stopped", *saving}, done.stdout
    for name, one in runs.items():
        assert one["largest_difference"] < 2e-4 and len(one["losses"]) == 3, name
    assert all(runs[name]["checkpoint_bytes"] > 1e6 and "stands_still_s" in runs[name] for name in saving)
    assert results["exchange"]["tokens"]["1024"]["ms"] > 0
    ended = {line.split("] ")[1].split(" after")[0] for line in done.stdout.splitlines() if " after " in line}
    assert "fsdp2_sharded-stopped: exit 1" in ended and "fsdp2_sharded-stopped: exit 0" in ended, done.stdout
