"""Runs ``test_triton_kernels.py`` under Triton's interpreter, which has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).with_name("test_triton_kernels.py")


def run(*arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", str(FILE), "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=FILE.parents[2])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU itself")
def test_kernels_in_the_interpreter():
    done = run()
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-400:]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_kernels_in_the_interpreter_slow():
    done = run("-m", "slow")
    assert done.returncode == 0, done.stdout[-4000:]
    assert "201 passed" in done.stdout, done.stdout[-400:]
