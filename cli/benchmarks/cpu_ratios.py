"""The CPU grid of ``bench kernels`` on a machine that others use too, and how much of `fused_moe` is matrix products.

``python -m deepseek_cli.benchmarks.cpu_ratios`` times the same cells in turn by the processor time of this process, on
one thread, so that other work costs a cell its cache but not its turn. `eager`, ten times slower in training, runs
forward only. Of forward passes it also times the bare products, on rows that were gathered before: what no
implementation can leave out.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

from deepseek_cli.benchmarks.kernel_cells import GRIDS, Cell
from deepseek_cli.benchmarks.kernel_peers import find_implementations
from deepseek_cli.benchmarks.kernel_timing import Mark, interleave
from deepseek_cli.benchmarks.kernels import _Layer, _steps_that_agree
from deepseek_kernels.cpu.products import linear_into

FORWARD = ("fused_moe", "eager", "grouped_mm", "batched_mm")
TRAINING = ("fused_moe", "grouped_mm")
_PRODUCTS = "products"
# Tokens; of more `batched_mm` copies gigabytes, and leaves the others a cold cache and few rounds.
_MOST_COPIED = 4


def measure(cell: Cell, seconds: float, *, is_training: bool) -> dict[str, float]:
    """Return the milliseconds of each implementation that computes what the loop does, and of the bare products.

    Args:
        cell: What to run.
        seconds: How long to go on, about.
        is_training: Whether forward and backward, without the bare products.
    """
    found, _ = find_implementations()
    layer = _Layer(cell, "cpu")
    names = [name for name in (TRAINING if is_training else FORWARD) if name in found]
    if cell.T > _MOST_COPIED:
        names = [name for name in names if name != "batched_mm"]
    steps, _ = _steps_that_agree(layer, {name: found[name] for name in names}, is_training)
    if not is_training:
        steps[_PRODUCTS] = _bare_products(layer)
    timings = interleave(steps, seconds, "cpu", clock=time.process_time)
    return {name: parts[-1].ms for name, parts in timings.items()}


def _bare_products(layer: _Layer) -> Callable[[Mark], None]:
    """Both products of every expert, on rows that lie there and into buffers that exist."""
    flat = layer.routing.mask_unused(layer.cell.E).flatten()
    counts = torch.bincount(flat, minlength=layer.cell.E + 1)[: layer.cell.E].tolist()
    rows = layer.x[flat.argsort(stable=True)[: sum(counts)] // layer.cell.K]
    gate_up, down = layer.experts.gate_up_proj.detach(), layer.experts.down_proj.detach()
    h = rows.new_empty(len(rows), gate_up.shape[1])
    y = rows.new_empty(len(rows), down.shape[1])
    a = torch.rand(len(rows), down.shape[2]).to(rows.dtype)

    @torch.no_grad()
    def step(mark: Mark) -> None:
        mark()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                end = start + count
                linear_into(rows[start:end], gate_up[expert], h[start:end])
                linear_into(a[start:end], down[expert], y[start:end])
                start = end
        mark()

    return step


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each cell and mode, and the mean.

    Args:
        argv: Arguments instead of the command line's.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--grid", choices=("cpu", "quick"), default="cpu", help="cells (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    ratios = []
    for cell in GRIDS[args.grid]:
        for is_training in (False, True):
            ms = measure(cell, args.seconds, is_training=is_training)
            products = ms.pop(_PRODUCTS, None)
            own = ms.pop("fused_moe")
            ratios.append(min(ms.values()) / own)
            mode = "forward+backward" if is_training else "forward"
            others = ", ".join(f"{name} {value:.2f}" for name, value in ms.items())
            share = "" if products is None else f"; products alone {products:.2f}, {products / own:.0%}"
            print(f"{cell.title}, {mode}: fused_moe {own:.2f} ms, {others}: {ratios[-1]:.2f} times{share}", flush=True)
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    below = sum(ratio < 1 for ratio in ratios)
    print(f"{len(ratios)} rows: geometric mean {mean:.2f}, lowest {min(ratios):.2f}, {below} below 1")
    return 0


if __name__ == "__main__":
    sys.exit(main())
