"""Starts commands of deepseek-moe in several processes, through an engine's own launcher."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_training.trainer.distributed_engine import launch_config

WORKER = str(Path(__file__).parent / "jobs_worker.py")
NEEDS_DEEPSPEED = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="needs deepspeed")


def start(engine, processes, program, **environment):
    """A program's finished processes; without an engine, one process without a launcher."""
    launcher = {
        None: [],
        "torchrun": ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"],
    }
    accelerate = ["-m", "accelerate.commands.accelerate_cli", "launch", f"--num_processes={processes}"]
    words = launcher[engine] if engine in launcher else [*accelerate, "--config_file", str(launch_config(engine))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *words, *program], capture_output=True, text=True, env=environment)


def run_jobs(engine, processes, jobs, folder):
    """Run jobs of `jobs_worker` one after another; of each process what became of them, by name."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    done = start(engine, processes, [WORKER, str(path)])
    leaves = any(job.get("leave") for job in jobs)
    assert (done.returncode == 0) != leaves, done.stderr[-3000:]
    found = [json.loads(one.read_text()) for one in sorted(folder.glob("jobs.*.json"))]
    for process in found:
        for job in jobs:
            if not job.get("leave"):
                expected = ("stopped",) if "stop_at" in job else (0, 3)
                assert process[job["name"]]["code"] in expected, (job["name"], process[job["name"]])
    return found
