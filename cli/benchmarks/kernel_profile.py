"""Where a training step of the layer spends its time: milliseconds per kernel, ours and ``grouped_mm``'s.

``dev/measure_on_gpu.sh`` runs it::

    python -m deepseek_cli.benchmarks.kernel_profile [--once]

With ``--once`` a single step runs unprofiled, for Nsight Compute to look at. Also prints the host's time per call:
what a step cannot get below, however small the batch.
"""

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from deepseek_cli.benchmarks.kernel_cells import LEASE_GRID, Cell
from deepseek_cli.benchmarks.kernel_peers import find_implementations
from deepseek_cli.benchmarks.kernel_timing import synchronize
from deepseek_cli.benchmarks.kernels import _ignore, _Layer

_CALLS = 20


def profile_cell(cell: Cell, device: str, names: list[str]) -> None:
    """Print a table of kernels per implementation.

    Args:
        cell: What to run.
        device: ``cpu`` or ``cuda``.
        names: Of implementations.
    """
    layer, (present, _) = _Layer(cell, device), find_implementations()
    activities = [ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]
    for name in names:
        step = layer.make_step(name, present[name], True)
        for _ in range(3):
            step(_ignore)
        synchronize(device)
        with profile(activities=activities) as profiler:
            for _ in range(3):
                step(_ignore)
            synchronize(device)
        print(f"\n{name}, forward and backward three times, {cell.title}", flush=True)
        print(
            profiler.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=16, max_name_column_width=60)
        )
        layer.experts.zero_grad()


def host_times(cell: Cell, device: str) -> None:
    """Print how long the host is busy with one call, without waiting for the device.

    Args:
        cell: A small one, so that the device is never the one that is waited for.
        device: ``cpu`` or ``cuda``.
    """
    layer, (present, _) = _Layer(cell, device), find_implementations()
    for is_training in (False, True):
        step = layer.make_step("fused_moe", present["fused_moe"], is_training)
        step(_ignore)
        synchronize(device)
        begun = time.perf_counter()
        for _ in range(_CALLS):
            step(_ignore)
        spent = time.perf_counter() - begun
        synchronize(device)
        mode = "forward+backward" if is_training else "forward"
        print(f"host per call, {mode}, {cell.title}: {1e6 * spent / _CALLS:.0f} us", flush=True)


def main() -> None:
    """Profile the largest cell and time the host on a small one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--once", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = Cell(5, 16, 16, 2, 2)  # the interpreter takes milliseconds a step
    large = LEASE_GRID[0] if device == "cuda" else tiny
    if args.once:
        layer, (present, _) = _Layer(large, device), find_implementations()
        layer.make_step("fused_moe", present["fused_moe"], True)(_ignore)
        synchronize(device)
        return
    profile_cell(large, device, ["fused_moe", "torch_grouped_mm"])
    if device == "cuda":
        profile_cell(LEASE_GRID[2], device, ["fused_moe"])
        small = Cell(16, 2048, 768, 128, 12, dtype="bfloat16")
    else:
        small = tiny
    host_times(small, device)


if __name__ == "__main__":
    main()
