"""Runs the Triton kernels' tests in the interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
FILES = [
    "gpu/test_triton_kernels.py",
    "gpu/test_triton_layer.py",
    "gpu/test_triton_rows.py",
    "gpu/test_tune.py",
    "gpu/test_triton_epilogue.py",
    "gpu/test_four_bit_kernels.py",
]
# Tiles of a GPU's size, faults that the others must see, FP8, and adapters.
LONG_FILES = [
    "gpu/test_production_tiles.py",
    "gpu/test_planted_faults.py",
    "gpu/test_fp8_kernels.py",
    "gpu/test_triton_lora.py",
    "gpu/test_fp8_lora_kernels.py",
]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FOLDER)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-400:]
    return done.stdout


# In two processes: each takes seconds to import torch.
@pytest.mark.parametrize("names", [[FILES[1]], [FILES[0], *FILES[2:]]], ids=["layer", "kernels"])
def test_kernels_in_the_interpreter(names):
    run(*names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_long_files_in_the_interpreter():
    run(*LONG_FILES)


@pytest.mark.slow
@pytest.mark.timeout(6000)
@pytest.mark.parametrize(
    "name", [name for name in FILES + LONG_FILES if "mark.slow" in (FOLDER / name).read_text(encoding="utf-8")]
)
def test_slow_kernels_in_the_interpreter(name):
    run(name, "-m", "slow", "--timeout", "600")


@pytest.mark.slow
@pytest.mark.timeout(9000)
def test_fuzz_in_the_interpreter():
    assert "400 passed" in run("test_fuzz.py", "-m", "slow", "--timeout", "600")
