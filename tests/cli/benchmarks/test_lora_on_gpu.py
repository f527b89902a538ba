"""The timing of LoRA steps on a GPU, run at tiny sizes in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from deepseek_cli.benchmarks.lora_on_gpu import FILE, KINDS


@pytest.mark.slow
def test_every_kind_is_right_and_timed(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "deepseek_cli.benchmarks.lora_on_gpu", "--small", "--seconds", "0.1"]
    done = subprocess.run([*command, "--output", str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / FILE).read_text())["rows"]
    assert [row["T"] for row in rows] == [20, 40]
    assert all(row[kind]["ms"] > 0 for row in rows for kind in KINDS)
    assert all(len(part) == 2 and min(part) > 0 for kind in KINDS for part in rows[0]["parts"][kind].values())
    # The fold rounds weight and factors together, so they are near but not equal.
    assert all(0 < row["error"] < 3e-2 for row in rows)
    assert "the times mean nothing" not in done.stdout
