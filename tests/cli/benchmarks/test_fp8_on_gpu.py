"""The benchmark of FP8 without a GPU: every launch compiles for an H100, and the layer's steps run interpreted."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import driver
from triton.runtime.jit import JITFunction

from deepseek_cli.benchmarks import fp8_kernels, fp8_on_gpu
from deepseek_kernels.gpu import combine, fp8_experts
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu.tiles import TARGETS, Tile

STEPS = """
from deepseek_cli.benchmarks.fp8_layer import Layer
from deepseek_cli.benchmarks.fp8_on_gpu import _layer_line, measure_layer
for row in measure_layer(Layer.make((9, 140, 136, 3, 2), "cpu"), 0.01, "cpu"):
    print(_layer_line(row), row.get("decibels"))
    assert min(row.get("decibels", {"": 20}).values()) > 15
"""
pytestmark = [pytest.mark.slow, pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmark itself runs")]


def test_the_shipped_tiles_are_the_first():
    for name, tiles in fp8_kernels.VARIANTS.items():
        assert tiles[0] == getattr(fp8_kernels.MANY_ROWS, name) and all(isinstance(tile, Tile) for tile in tiles)


@pytest.mark.parametrize("part", fp8_on_gpu._PARTS)
def test_every_part_compiles(part, monkeypatch, capsys):
    if JITFunction is not type(combine.combine_kernel):
        pytest.skip("the kernels are interpreted")
    from absent_gpu import AbsentGpu

    for owner, name in (
        (JITFunction, "run"),
        (fused_moe_gpu, "choose_tiles"),
        (fp8_experts, "choose_fp8_tiles"),
        (fp8_experts, "weight_gradient_tile"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # to be put back: the function below replaces them
    driver.set_active(AbsentGpu(TARGETS["sm_90"]))
    try:
        fp8_on_gpu._compile((0, 256, 128, 4, 2), part)
    finally:
        driver._active = None
    assert "Error" not in capsys.readouterr().out


def test_steps_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("forward + backward") == 3
