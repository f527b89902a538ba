"""Checkpoint cadence: the formula against a simulation of every device, and against a search."""

import pytest

from deepseek_training.launch.cluster.failures import (
    Checkpointing,
    best_interval_s,
    estimate_checkpoint,
    expected_goodput,
    mean_hours_between_failures,
    simulate,
)

COST = Checkpointing(size_bytes=2e12, pause_s=60.0, write_s=60.0, restart_s=600.0)


def test_the_best_interval_is_best():
    failure_s = 5 * 3600.0
    best = best_interval_s(COST.pause_s, failure_s)
    tried = [best * factor for factor in (0.5, 0.8, 1.0, 1.25, 2.0)]
    goodputs = [expected_goodput(interval, COST, failure_s) for interval in tried]
    assert max(goodputs) == goodputs[2]


@pytest.mark.parametrize("factor", [0.3, 1.0, 4.0])
def test_simulated_devices_lose_what_the_formula_says(factor):
    devices, device_s = 2000, 2000 * 5 * 3600.0
    interval = factor * best_interval_s(COST.pause_s, device_s / devices)
    runs = [
        simulate(40 * 86400.0, interval, COST, num_devices=devices, device_s=device_s, seed=seed) for seed in range(12)
    ]
    mean = sum(runs) / len(runs)
    error = (sum((run - mean) ** 2 for run in runs) / (len(runs) - 1) / len(runs)) ** 0.5
    expected = expected_goodput(interval, COST, device_s / devices)
    assert abs(mean - expected) < 3.5 * error + 1e-4 and error < 0.01


def test_no_failures_lose_only_the_pauses():
    found = simulate(1e5, 1000.0, COST, num_devices=3, device_s=1e15)
    assert found == pytest.approx(1000 / 1060)


def test_a_run_that_never_gets_anywhere_ends():
    assert simulate(1e4, 1e4, COST, num_devices=10, device_s=10 * 300.0, limit=3) < 0.01


def test_llama_3s_failures():
    assert mean_hours_between_failures(16384) == pytest.approx(54 * 24 / 419)


def test_a_checkpoint_holds_the_fp32_copy_and_both_moments():
    cost = estimate_checkpoint(1e9, 10, moment_bytes=4, storage_bytes_per_second=1e9, restart_s=100)
    assert cost.size_bytes == 12e9 and cost.write_s == 12 and cost.restart_s == 112
