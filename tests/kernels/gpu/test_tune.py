"""Tuning: the search with an injected clock, what it saves, and that `fused_moe` then runs with it, and rightly.

The kernels really run, on a GPU or in a process started with TRITON_INTERPRET=1 (``test_in_interpreter.py``).
"""

import os

import pytest
import torch

pytest.importorskip("triton")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from moe_cases import assert_equals_reference, gradients, make_case
from triton.runtime.errors import OutOfResources

from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu import tiles, tune
from deepseek_kernels.gpu.tiles import ROW_KERNELS, Tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW, HIGH = Tile(16, 16, 16, 4, 1), Tile(32, 32, 16, 4, 1)
CANDIDATES = {**{name: (LOW, HIGH) for name in ROW_KERNELS}, "weight_gradient": (LOW, HIGH)}
SHAPE = {"num_tokens": 3, "num_slots": 2, "hidden": 14, "width": 5, "num_experts": 2}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiles._choose.cache_clear()
    yield
    tiles._choose.cache_clear()


class Clock:
    """Tells the time of the candidate that ran last."""

    def __init__(self, monkeypatch, milliseconds):
        self.milliseconds, self.ran = milliseconds, []
        original = tune._kernel

        def noted(name, inputs, num_slots, tile):
            self.ran.append((name, tile))
            return original(name, inputs, num_slots, tile)

        monkeypatch.setattr(tune, "_kernel", noted)

    def __call__(self, function):
        assert callable(function)
        return self.milliseconds(*self.ran[-1])


def search(monkeypatch, milliseconds, **changes):
    settings = {"dtype": torch.float32, "device": DEVICE, "candidates": CANDIDATES, "groups": (), **changes}
    return tune.tune(**SHAPE, **settings, timer=Clock(monkeypatch, milliseconds))


def test_the_height_with_the_least_sum_wins_and_is_used(monkeypatch):
    # gate_up alone is faster at 16 rows; all four together are not.
    times = {("gate_up", 16): 1, ("gate_up", 32): 2, ("down", 16): 9, ("down", 32): 3}
    best = search(
        monkeypatch, lambda name, tile: times.get((name, tile.block_m), 5) - (tile.group_m == 2) / 2, groups=(2, 8)
    )
    assert best.block_m == 32 and best.gate_up.group_m == best.weight_gradient.group_m == 2
    case = make_case(torch.float32, T=3, H=14, I=5, E=2, K=2, device=DEVICE)
    assert fused_moe_gpu.tiles_for(case[0], case[2], 6) == best
    assert_equals_reference(gradients(fused_moe, case), case, torch.float32)
    other = make_case(torch.float32, T=3, H=14, I=6, E=2, K=2, device=DEVICE)
    assert fused_moe_gpu.tiles_for(other[0], other[2], 6) != best


@pytest.mark.slow
def test_a_backward_pass_after_tuning_is_right(monkeypatch):
    """Forward with tiles of one height, backward with another's: the tile map must not be carried over."""
    case = make_case(torch.float32, T=40, H=18, I=10, E=3, K=2, device=DEVICE)

    def tuned_in_between(*arguments, activation):
        output = fused_moe(*arguments, activation=activation)
        bucket = tiles.row_bucket(80, 3)
        tall = tiles.Tiles(*(HIGH,) * 5)
        tiles.save_tuned(tiles.device_name(case[0].device), 18, 10, bucket, tall)
        return output

    assert_equals_reference(gradients(tuned_in_between, case), case, torch.float32)


def test_a_candidate_that_does_not_fit_is_passed_over(monkeypatch):
    def milliseconds(name, tile):
        if tile.block_m == 16:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1.0

    assert search(monkeypatch, milliseconds).block_m == 32
    with pytest.raises(ValueError, match="candidates: none of them runs on"):
        search(monkeypatch, milliseconds, candidates={name: (LOW,) for name in CANDIDATES})


def test_a_candidate_with_another_result_is_passed_over(monkeypatch, caplog):
    original = tune.grouped_gemm

    def wrong(rows, weights, metadata, tile, *, transpose):
        result = original(rows, weights, metadata, tile, transpose=transpose)
        return result * 1.1 if tile.block_m == 16 and transpose else result

    monkeypatch.setattr(tune, "grouped_gemm", wrong)
    assert search(monkeypatch, lambda name, tile: float(tile.block_m)).block_m == 32
    assert "down with Tile(block_m=16" in caplog.text


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="tune: a CUDA graph is being captured"):
        tune.tune(**SHAPE, device="cuda")
    assert not tiles.tuned_path().exists()
