"""Other projects' kernels in `deepseek-moe bench kernels`: Liger really run, by Triton's interpreter without a GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

from deepseek_cli.benchmarks.kernel_cells import Cell
from deepseek_cli.benchmarks.kernel_peers import find_implementations
from deepseek_cli.benchmarks.kernels import measure_cell

LIGER = """
import json, torch
from deepseek_cli.benchmarks.kernels import measure_cell
from deepseek_cli.benchmarks.kernel_cells import Cell
from deepseek_cli.benchmarks.kernel_peers import find_implementations

present, _ = find_implementations()
some = {name: present[name] for name in ("eager", "liger")}
device = "cuda" if torch.cuda.is_available() else "cpu"
print(json.dumps(measure_cell(Cell(3, 16, 16, 3, 3, "dynamic"), device, 0.01, some)))
"""


@pytest.mark.slow
def test_liger_computes_the_same_and_is_timed():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}
    if torch.cuda.is_available():
        del environment["TRITON_INTERPRET"]
    done = subprocess.run([sys.executable, "-c", LIGER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert not [row for row in rows if "skipped" in row]
    modes = [row["mode"] for row in rows if row["implementation"] == "liger"]
    assert modes == ["forward"] if torch.cuda.is_available() else ["forward", "backward", "forward+backward"]


def test_who_computes_something_else_is_reported_and_not_timed():
    present, _ = find_implementations()

    def wrong(experts, hidden_states, indices, weights):
        return present["eager"](experts, hidden_states, indices, weights * 1.001)

    rows = measure_cell(Cell(5, 16, 8, 4, 2), "cpu", 0.01, {"eager": present["eager"], "wrong": wrong})
    (reasons,) = {row["skipped"] for row in rows if row["implementation"] == "wrong"}
    assert reasons == "differs from the loop in float32: output by 1.0e-03 of a tile, allowed 1e-04"


@pytest.mark.parametrize("name", ["liger", "scattermoe"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setattr("deepseek_cli.benchmarks.kernel_peers.find_spec", lambda package: None)
    present, absent = find_implementations()
    assert name not in present and "is not installed" in absent[name]
    assert {"eager", "grouped_mm", "batched_mm", "fused_moe"} <= set(present)
