"""What the fused layer costs the host, and what it costs the GPU: where the one waits for the other.

With few tokens a GPU is done before the host has launched the next kernel. Run on a GPU, from the repository's root::

    python -m deepseek_cli.benchmarks.host_cost [--output FOLDER] [--tokens 1 64 1024]

Per number of tokens and part of a step, beside torch's grouped product as ``bench kernels`` runs it: `host_us`, from
call to return on an idle stream, not waiting for the device; `device_us`, from the first kernel to the last with the
host ahead, for the device is kept busy until everything is launched; `step_us`, steps one after the other as a program
runs them. ``backward, called directly`` is the backward pass's kernels without torch's autograd around them.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek_cli.benchmarks.kernel_cells import Cell
from deepseek_cli.benchmarks.kernel_peers import Experts, find_implementations
from deepseek_cli.benchmarks.kernel_timing import Mark, synchronize
from deepseek_cli.benchmarks.kernels import _ignore, _Layer
from deepseek_kernels.triton_path import experts_gpu

TOKENS = (1, 4, 8, 64, 256, 1024, 4096)
NAMES = ("fused_moe", "torch_grouped_mm")
PARTS = {False: ("forward without gradients",), True: ("forward with gradients", "backward")}
DIRECT = "backward, called directly"
_WARM_UPS, _CALLS = 3, 15
_BUSY_CYCLES = 120_000_000  # 60 ms of an H200: longer than the host takes for all calls


def measure_tokens(num_tokens: int, device: str, names: tuple[str, ...] = NAMES) -> list[dict[str, Any]]:
    """Return a row per implementation and part of a step.

    Args:
        num_tokens: T.
        device: ``cpu`` or ``cuda``; on a CPU everything is the host's time.
        names: Of implementations.
    """
    is_gpu = device == "cuda"
    cell = Cell(num_tokens, 2048, 768, 128, 8, dtype="bfloat16") if is_gpu else Cell(num_tokens, 16, 16, 4, 2)
    layer, present = _Layer(cell, device), find_implementations()[0]
    rows = []
    for name in names:
        for is_training, parts in PARTS.items():
            step = layer.make_step(name, present[name], is_training)
            rows += _rows(cell, name, parts, step, device)
        layer.experts.zero_grad()
    if is_gpu:
        rows += _rows(cell, "fused_moe", (DIRECT,), _direct_backward(layer, present["fused_moe"]), device)
    return rows


def _rows(
    cell: Cell, name: str, parts: tuple[str, ...], step: Callable[[Mark], object], device: str
) -> list[dict[str, Any]]:
    for _ in range(_WARM_UPS):
        step(_ignore)
    host, busy = host_us(step, device), device_us(step, device)
    step_us = _step_us(step, device)
    return [
        {"T": cell.T, "implementation": name, "part": part, "host_us": host[i], "device_us": busy[i]}
        | {"step_us": step_us if part == parts[-1] else None}
        for i, part in enumerate(parts)
    ]


def _direct_backward(layer: _Layer, implementation: Experts) -> Callable[[Mark], object]:
    """The backward pass's kernels on what one forward pass kept."""
    experts, indices, weights = layer.experts, layer.indices_for("fused_moe"), layer.routing.weights
    operands = (layer.x, experts.gate_up_proj.detach(), experts.down_proj.detach())
    with torch.no_grad():
        _, kept, order = experts_gpu.forward(*operands, indices, weights, "silu", True)
    assert order is not None  # what is kept is sorted
    needs = [True] * 4 + [False]

    def step(mark: Mark) -> None:
        mark()
        experts_gpu.backward(layer.x, *operands, order, weights, kept, "silu", needs)
        mark()

    return step


def host_us(step: Callable[[Mark], object], device: str) -> list[float]:
    """Return the median microseconds of each part between call and return, on an idle stream.

    Args:
        step: Marks the ends of its parts.
        device: ``cpu`` or ``cuda``.
    """
    samples: list[list[float]] = []
    marks: list[float] = []
    for _ in range(_CALLS):
        marks.clear()
        synchronize(device)
        step(lambda: marks.append(time.perf_counter()))
        samples.append([1e6 * (end - begin) for begin, end in itertools.pairwise(marks)])
    return [statistics.median(part) for part in zip(*samples, strict=True)]


def device_us(step: Callable[[Mark], object], device: str) -> list[float]:
    """Return the median microseconds of each part on the device, which is kept busy until all is launched.

    Args:
        step: Marks the ends of its parts.
        device: ``cpu`` or ``cuda``.
    """
    if device == "cpu":
        return host_us(step, device)
    samples: list[list[float]] = []
    marks: list[list[Any]] = []

    def mark() -> None:
        marks[-1].append(torch.cuda.Event(enable_timing=True))
        marks[-1][-1].record()

    synchronize(device)
    torch.cuda._sleep(_BUSY_CYCLES)
    for _ in range(_CALLS):
        marks.append([])
        step(mark)
    synchronize(device)
    for events in marks:
        samples.append([1e3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)])
    return [statistics.median(part) for part in zip(*samples, strict=True)]


def _step_us(step: Callable[[Mark], object], device: str) -> float:
    """Microseconds per step of many in a row, the last one finished."""
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(_CALLS):
        step(_ignore)
    synchronize(device)
    return 1e6 * (time.perf_counter() - begun) / _CALLS


def table_of(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table.

    Args:
        rows: From `measure_tokens`.
    """
    lines = ["| T | part | implementation | host us | device us | step us |", "| --- | --- | --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: (row["T"], row["part"])):
        step_us = "" if row["step_us"] is None else f"{row['step_us']:.0f}"
        lines.append(
            f"| {row['T']} | {row['part']} | {row['implementation']} | {row['host_us']:.0f} | {row['device_us']:.0f} "
            f"| {step_us} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure every number of tokens, print the table and write it as JSON.

    Args:
        arguments: Of the command line.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [row for num_tokens in args.tokens for row in measure_tokens(num_tokens, device)]
    machine = {"torch": torch.__version__, "device": torch.cuda.get_device_name() if device == "cuda" else device}
    print(f"{machine}\n{table_of(rows)}", flush=True)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "host_cost.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
