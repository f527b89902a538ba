"""Each Triton product alone, with the shipped tile and with others, in one process on one GPU.

``dev/measure_on_gpu.sh`` runs it::

    python -m deepseek_cli.benchmarks.kernel_variants --output FOLDER

It answers which tile a kernel should ship with, and what a whole layer gains by it: the shipped tiles and the ones
before them run in turn. A variant is timed only if it
gives the safe tiles' result block by block. Writes ``variants.json`` after every kernel, so that what was measured
survives a time limit. With ``--compile-only`` many processes compile all that this and the benchmark will
run, into Triton's cache; in one process compiling takes ten times as long as timing.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from deepseek_cli.benchmarks.compile_ahead import compile_in_processes, compile_instead_of_launching
from deepseek_cli.benchmarks.kernel_cells import LEASE_GRID, Cell
from deepseek_cli.benchmarks.kernel_peers import find_implementations
from deepseek_cli.benchmarks.kernel_timing import Mark, interleave
from deepseek_cli.benchmarks.kernels import _Layer
from deepseek_kernels.expert_loop import largest_tile_error
from deepseek_kernels.gpu import experts as fused_moe_gpu
from deepseek_kernels.gpu import tune
from deepseek_kernels.gpu.combine import combine
from deepseek_kernels.gpu.routing_metadata import routing_metadata
from deepseek_kernels.gpu.tiles import ROW_BUCKETS, SAFE, SHIPPED, Tile, Tiles

# Rows of one expert by columns by inner, warps, stages; the shipped tile is the first of each, the second the one
# that shipped before anything was timed.
VARIANTS: dict[str, tuple[Tile, ...]] = {
    "gate_up": (
        Tile(128, 128, 64, 8, 3, uses_descriptor=True),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 8, 4, uses_descriptor=True),
        Tile(128, 128, 64, 8, 3, group_m=1, uses_descriptor=True),
        Tile(128, 128, 64, 8, 3, group_m=16, uses_descriptor=True),
    ),
    "down": (
        Tile(128, 256, 64, 8, 4, uses_descriptor=True),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 3, uses_descriptor=True),
        Tile(128, 128, 64, 8, 3, uses_descriptor=True),
        Tile(128, 256, 64, 8, 4, group_m=32, uses_descriptor=True),
    ),
    "input_gradient": (
        Tile(128, 256, 64, 8, 3, uses_descriptor=True),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 4, uses_descriptor=True),
        Tile(128, 256, 64, 8, 3, group_m=4, uses_descriptor=True),
        Tile(128, 256, 64, 8, 3, group_m=16, uses_descriptor=True),
    ),
    "down_backward": (
        Tile(128, 128, 64, 8, 3, max_registers=128, uses_descriptor=True),
        Tile(128, 64, 64, 8, 4),
        Tile(128, 128, 64, 8, 3, max_registers=128),
        Tile(128, 128, 64, 8, 3, group_m=1, max_registers=128, uses_descriptor=True),
        Tile(128, 128, 64, 8, 3, group_m=32, max_registers=128, uses_descriptor=True),
    ),
    "weight_gradient": (
        Tile(128, 256, 64, 8, 5),
        Tile(128, 256, 64, 8, 3),
        Tile(128, 256, 64, 8, 7),
        Tile(128, 256, 64, 8, 5, group_m=32),
        Tile(128, 256, 32, 8, 7),
        Tile(256, 128, 64, 8, 5),
    ),
}
_SETS = {
    name: Tiles(**{kernel: tiles[position] for kernel, tiles in VARIANTS.items()})
    for position, name in enumerate(("shipped", "before"))
}
# T, K, H, I, E: where training runs, and where an expert has a few hundred rows only.
SHAPES = ((32768, 12, 2048, 768, 128), (4096, 12, 2048, 768, 128))
_PRODUCTS = {"gate_up": 2, "down": 1, "input_gradient": 2, "down_backward": 1, "weight_gradient": 3}


def measure(shape: tuple[int, ...], kernels: list[str], milliseconds: int) -> list[dict[str, Any]]:
    """Return a row per kernel and tile.

    Args:
        shape: T, K, H, I, E.
        kernels: Names from `VARIANTS`.
        milliseconds: How long to time each.
    """
    num_tokens, num_slots, hidden, width, num_experts = shape
    inputs = tune._make_inputs(num_tokens, num_slots, hidden, width, num_experts, torch.bfloat16, "cuda")
    rows = []
    for name in kernels:
        wanted = tune._kernel(name, inputs, num_slots, getattr(SAFE, name))()
        for position, tile in enumerate(VARIANTS[name]):
            row: dict[str, Any] = {"shape": shape, "kernel": name, "tile": str(tile), "is_shipped": position == 0}
            try:
                run = tune._kernel(name, inputs, num_slots, tile)
                results = run()
                error = max(largest_tile_error(one, other) for one, other in zip(results, wanted, strict=True))
                del results
                row["tile_error"] = error
                if error <= tune._TOLERANCE:
                    low, median, high = do_bench(run, warmup=5, rep=milliseconds, quantiles=[0.25, 0.5, 0.75])
                    teraflops = 2 * _PRODUCTS[name] * num_tokens * num_slots * hidden * width / median / 1e9
                    row |= {"ms": median, "ms_low": low, "ms_high": high, "tflops": teraflops}
            except (OutOfResources, PTXASError, RuntimeError) as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            rows.append(row)
            print(_line(row), flush=True)
        del wanted
    return rows


def measure_small(shape: tuple[int, ...], milliseconds: int) -> list[dict[str, Any]]:
    """Return a row each for sorting and for the sum over a token's rows, which multiply nothing.

    Args:
        shape: T, K, H, I, E.
        milliseconds: How long to time each.
    """
    num_tokens, num_slots, hidden, width, num_experts = shape
    inputs = tune._make_inputs(num_tokens, num_slots, hidden, width, num_experts, torch.bfloat16, "cuda")
    metadata = routing_metadata(inputs.indices, num_experts, 128)
    rows_of_y = torch.randn(num_tokens * num_slots, hidden, device="cuda", dtype=torch.bfloat16)
    moved = {"combine": 2 * hidden * num_tokens * (num_slots + 1), "metadata": 0}
    rows = []
    for name, run in (
        ("metadata", lambda: routing_metadata(inputs.indices, num_experts, 128)),
        ("combine", lambda: combine(rows_of_y, metadata.slot_row, num_slots, inputs.weights)),
    ):
        low, median, high = do_bench(run, warmup=5, rep=milliseconds, quantiles=[0.25, 0.5, 0.75])
        row: dict[str, Any] = {"shape": shape, "kernel": name, "tile": "", "is_shipped": True, "tile_error": 0.0}
        row |= {"ms": median, "ms_low": low, "ms_high": high, "gb_per_s": moved[name] / median / 1e6}
        rows.append(row)
        print(_line(row), flush=True)
    return rows


def measure_layers(cells: list[Cell], seconds: float) -> list[dict[str, Any]]:
    """Return a row per cell, mode and set of tiles: whole steps with the shipped tiles and the ones before, in turn.

    Args:
        cells: Of many rows per expert.
        seconds: How long to go on with each.
    """
    choose, rows = fused_moe_gpu.choose_tiles, []
    step_of = find_implementations()[0]["fused_moe"]

    def with_tiles(tiles: Tiles, step: Callable[[Mark], object]) -> Callable[[Mark], object]:
        def run(mark: Mark) -> object:
            fused_moe_gpu.choose_tiles = lambda *arguments: tiles
            return step(mark)

        return run

    for cell in cells:
        layer = _Layer(cell, "cuda")
        for is_training in (False, True):
            step = layer.make_step("fused_moe", step_of, is_training)
            timings = interleave({name: with_tiles(tiles, step) for name, tiles in _SETS.items()}, seconds, "cuda")
            for name, (*_, total) in timings.items():
                row = {"cell": cell.title, "is_training": is_training, "tiles": name, "ms": total.ms}
                rows.append(row | {"ms_stderr": total.stderr, "num_rounds": total.num_rounds})
                print(f"layer, {row}", flush=True)
    fused_moe_gpu.choose_tiles = choose
    return rows


def compile_in_parallel() -> None:
    """Compile what this file and the benchmark's grid will run, by as many processes as there are cores."""
    num_parts = max(1, min(6, (os.cpu_count() or 1) - 2))
    cells = list({_small(cell) for cell in LEASE_GRID})
    jobs: list[Any] = [(_compile_layer, (cell, name)) for cell in cells for name in _SETS]
    compile_in_processes(jobs + [(_compile_variants, (SHAPES[0], i, num_parts)) for i in range(num_parts)])


def _small(cell: Cell) -> Cell:
    """The cell with as few tokens as run the same kernels."""
    least = cell.T if cell.is_decode else (ROW_BUCKETS[-1] + 1) * cell.E // cell.K + 1
    return replace(cell, T=min(cell.T, least), routing="balanced")


def _compile_layer(cell: Cell, name: str) -> None:
    compile_instead_of_launching()
    if not cell.is_decode:
        fused_moe_gpu.choose_tiles = lambda *arguments: _SETS[name]
    inputs = _empty_inputs((cell.T, cell.K, cell.H, cell.I, cell.E))
    operands = (inputs.x, inputs.gate_up_proj, inputs.down_proj)
    fused_moe_gpu.forward(*operands, inputs.indices, inputs.weights, "silu", False)
    if not cell.is_decode:
        _, kept, metadata = fused_moe_gpu.forward(*operands, inputs.indices, inputs.weights, "silu", True)
        assert metadata is not None  # what is kept is sorted
        needs = [True] * 4 + [False]
        fused_moe_gpu.backward(inputs.x, *operands, metadata, inputs.weights, kept, "silu", needs)


def _compile_variants(shape: tuple[int, ...], part: int, num_parts: int) -> None:
    """One part of the variants; T does not matter, for no kernel depends on it."""
    compile_instead_of_launching()
    inputs = _empty_inputs((64, *shape[1:]))
    everything = [(name, tile) for name, tiles in VARIANTS.items() for tile in (*tiles, getattr(SAFE, name))]
    for name, tile in everything[part::num_parts]:
        try:
            tune._kernel(name, inputs, shape[1], tile)()
        except (OutOfResources, PTXASError, RuntimeError) as error:
            print(f"{name} {tile}: {type(error).__name__}: {error}"[:300], flush=True)


def _empty_inputs(shape: tuple[int, ...]) -> tune._Inputs:
    """Operands of these sizes that are never read; untouched memory costs nothing."""
    num_tokens, num_slots, hidden, width, num_experts = shape
    sizes = [(num_tokens, hidden), (num_experts, 2 * width, hidden), (num_experts, hidden, width)]
    x, gate_up_proj, down_proj = (torch.empty(size, dtype=torch.bfloat16) for size in sizes)
    activated, preactivation = (x.new_empty(num_tokens * num_slots, n * width) for n in (1, 2))
    indices = torch.zeros(num_tokens, num_slots, dtype=torch.int64)
    return tune._Inputs(x, gate_up_proj, down_proj, indices, torch.ones(indices.shape), activated, preactivation)


def _describe(tile: str) -> str:
    """A tile in short: its sizes, and what is not usual."""
    words = tile.removeprefix("Tile(").removesuffix(")").split(", ")
    usual = ("group_m=8", "max_registers=0", "uses_descriptor=False")
    return " ".join(word.removesuffix("=True") for word in words if word not in usual).replace("block_", "")


def _line(row: dict[str, Any]) -> str:
    head = f"T={row['shape'][0]:<6} {row['kernel']:<16} {_describe(row['tile']):<44}"
    if "ms" not in row:
        return f"{head} {row.get('failed') or 'differs from the safe tiles by ' + format(row['tile_error'], '.1e')}"
    rate = f"{row['tflops']:7.1f} TFLOP/s" if "tflops" in row else f"{row['gb_per_s']:7.0f} GB/s"
    return (
        f"{head} {row['ms']:8.3f} ms ({row['ms_low']:.3f}-{row['ms_high']:.3f}) {rate} error {row['tile_error']:.1e}"
    )


def main() -> None:
    """Compile, measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument(
        "--compile-only", action="store_true", help="fill Triton's cache, also for the benchmark's grid"
    )
    parser.add_argument("--milliseconds", type=int, default=60)
    args = parser.parse_args()
    shipped = SHIPPED["sm_90", 0, 0, 2]
    if any(tiles[0] != getattr(shipped, name) for name, tiles in VARIANTS.items()):
        print("the first variants are not the shipped tiles")
    if args.compile_only:
        compile_in_parallel()
        return
    cells = [cell for cell in LEASE_GRID if not cell.is_decode]
    layers = measure_layers(cells, 10 * args.milliseconds / 1000)
    (args.output / "layers.json").write_text(json.dumps(layers, indent=1), encoding="utf-8")
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for kernels in [[name] for name in VARIANTS]:
            rows += measure(shape, kernels, args.milliseconds)
            (args.output / "variants.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        rows += measure_small(shape, args.milliseconds)
        (args.output / "variants.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
