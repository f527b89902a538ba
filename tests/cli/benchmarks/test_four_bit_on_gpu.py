"""What the measurement of 4-bit experts chooses and prints; its steps in the interpreter, in the slow run."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from deepseek_cli.benchmarks import four_bit_on_gpu, four_bit_rows

STEPS = """
from deepseek_cli.benchmarks import four_bit_on_gpu as bench
from deepseek_kernels.gpu.four_bit_experts import INTERPRETED

bench.NUM_CALLS, bench.COPIES_FROM, bench.OTHER_TILES = 1, 1, {2: {"small": INTERPRETED}}
layers = bench.Bench(bench.Shape(128, 128, 2, 1), 1, "cpu")
rows = bench.measure(layers, 2, 0.01, is_training=False) + bench.measure(layers, 2, 0.01, is_training=True)
assert len(rows) == 11 and all("ms" in row for row in rows), rows
print(bench.table(rows))
"""


def test_copies_are_timed_from_where_codes_might_lose():
    titles = [variant.title for variant in four_bit_on_gpu.variants_for(four_bit_on_gpu.COPIES_FROM)]
    assert titles == ["bf16", "int4 codes", "nf4 codes", "int4 copies", "nf4 copies"]
    assert len(four_bit_on_gpu.variants_for(1)) == 3 + len(four_bit_on_gpu.OTHER_TILES[1])


def test_a_variant_that_is_wrong_or_does_not_run_has_no_time_in_the_table():
    rows = [
        {"T": 1, "is_training": False, "variant": "bf16", "tile_error": 0.0, "ms": 0.5, "ms_stderr": 0.01},
        {"T": 1, "is_training": False, "variant": "int4 codes", "tile_error": 1e-3, "ms": 0.25, "ms_stderr": 0.01},
        {"T": 1, "is_training": False, "variant": "nf4 codes", "tile_error": float("inf")},
    ]
    lines = four_bit_on_gpu.table(rows).splitlines()
    assert lines[3] == "| 1 | forward | int4 codes | 0.2500 ± 0.0100 | 2.00 | 1.0e-03 |"
    assert lines[4] == "| 1 | forward | nf4 codes | not timed |  | inf |"


def test_torchs_packed_product_is_that_of_the_weights():
    packed = four_bit_rows.make(64, 128, 32)
    codes, scales = four_bit_rows.repack(packed, 3)
    x = four_bit_rows.torch.randn(2, 128).to(four_bit_rows.torch.bfloat16)
    got = four_bit_rows.torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, 32, scales).float()
    wanted = x.float() @ packed[3].float().T
    assert (got - wanted).norm() <= 1e-2 * wanted.norm()


@pytest.mark.slow
def test_every_step_runs():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("forward and dx") == 5
