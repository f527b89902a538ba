"""A roofline model of the Triton products: TFLOP/s on an H100 and an H200 from what compiling tells.

    deepseek-moe bench compile --predict [--measured FILE]

Registers and shared memory of the compiled kernel say how many programs a multiprocessor holds and how many blocks are
in flight; the tile says what a step multiplies and fetches. A step takes the longest of its product, its bytes from
the L2 cache and the wait for them; a program takes its steps and a beginning and an end, of which others hide a part
where they fit beside it; a kernel takes at least its bytes from memory:

    step     = max(flop / tensor * (1.31 by pointer), bytes / l2, latency / (programs * blocks in flight))
    program  = steps * step + (latency + bytes written / store) * (1 alone, 0.4 beside another)
    kernel   = max(programs per multiprocessor * program, bytes / memory)

The constants are fitted to the 18 tiles that an H200 timed at 32,768 tokens (docs/experiments.md), nothing else; the
check prints how far the model is from those and from what it has not seen: 4,096 tokens and whole layers. It knows no
host, no uneven routing and no card but these two; the H100 was measured after the fit. ``--measured`` holds it against
the ``results.json`` of ``deepseek-moe bench kernels``, pass by pass.

T tokens, K slots per token, S = T*K rows, H hidden, I expert width, E experts.
"""

import argparse
import math
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from deepseek_cli.benchmarks import compile_check
from deepseek_cli.benchmarks.compile_check import Usage, compile_products
from deepseek_cli.benchmarks.kernel_cells import Cell
from deepseek_cli.benchmarks.kernel_variants import VARIANTS
from deepseek_cli.benchmarks.result_files import BenchmarkRun
from deepseek_kernels.gpu.tiles import ROW_BUCKETS, SHIPPED, TARGETS, Tile, Tiles
from deepseek_records.json_files import read_object

PRODUCTS = ("gate_up", "down", "down_backward", "input_gradient", "weight_gradient")
_FORWARD = ("gate_up", "down")
_REGISTERS, _SHARED, _MULTIPROCESSORS = 65536, 233472, 132
# Fitted, all but the first, which torch's own large product reached on an H200: TFLOP/s, TB/s, microseconds.
_TENSOR, _L2, _LATENCY, _STORE = 719e12, 7.3e12, 1.29e-6, 21.6e12
_BY_POINTER, _BESIDE_ANOTHER = 1.31, 0.4
# TB/s that copies reach. The H100's was published; the one measured later reached 3.0.
CARDS = {"H100": 3.0e12, "H200": 4.3e12}
# Metadata and sums of a pass, without the host.
_SMALL_KERNELS = 6e-5
# Tensors of one column block that a program reads and writes at its end.
_EPILOGUE_BLOCKS = {"gate_up": 3, "down": 1, "input_gradient": 1, "down_backward": 5, "weight_gradient": 1}
# TFLOP/s on an H200 with the shipped tiles and with those before, at 32,768 and 4,096 tokens (docs/experiments.md).
_MEASURED_PRODUCTS = {
    "gate_up": ((559, 510), (511, 444)),
    "down": ((539, 513), (515, 466)),
    "input_gradient": ((597, 519), (578, 431)),
    "down_backward": ((422, 410), (286, 280)),
    "weight_gradient": ((517, 383), (410, 317)),
}
_MEASURED_TOKENS = (32768, 4096)
# Milliseconds forward and backward on an H200 (docs/kernels.md); at 1,024 tokens the host is what is waited for.
_MEASURED_LAYERS = {
    Cell(32768, 2048, 768, 128, 12): (6.90, 12.82),
    Cell(32768, 2048, 768, 128, 8): (4.79, 8.69),
    Cell(8192, 7168, 2048, 64, 8): (9.50, 21.45),
    Cell(4096, 2048, 768, 128, 12): (1.38, 2.98),
}
# Milliseconds that the H200 worked for a whole step, without what it waited for (docs/kernels.md).
_MEASURED_WORK = {Cell(4096, 2048, 768, 128, 8): 2.717}


@dataclass(frozen=True)
class Compiled:
    """One product: its tile and what the compiler made of it."""

    name: str
    tile: Tile
    usage: Usage

    @property
    def programs_per_multiprocessor(self) -> int:
        """How many fit, by registers and shared memory."""
        by_registers = _REGISTERS // (self.usage.registers * 32 * self.tile.num_warps)
        return max(1, min(by_registers, _SHARED // self.usage.shared))

    @property
    def step_bytes(self) -> int:
        """What one step brings into shared memory."""
        columns = self.tile.block_n * (2 if self.name == "gate_up" else 1)
        return 2 * self.tile.block_k * (self.tile.block_m + columns)

    @property
    def blocks_in_flight(self) -> int:
        """Copies under way while one block is multiplied."""
        return max(1, round(self.usage.shared / self.step_bytes) - 1)


@dataclass(frozen=True)
class _Work:
    """What a product of a layer is: programs, their steps, and all floating-point operations and bytes."""

    programs: float
    steps: int
    flop: float
    num_bytes: float


def _work(product: Compiled, cell: Cell) -> _Work:
    rows, tile, name = cell.T * cell.K, product.tile, product.name
    hidden, width, experts = cell.H, cell.I, cell.E
    if name == "weight_gradient":
        matrices = ((2 * width, hidden), (hidden, width))
        programs: float = experts * sum(math.ceil(m / tile.block_m) * math.ceil(n / tile.block_n) for m, n in matrices)
        num_bytes = 2 * rows * sum(m + n for m, n in matrices) + 2 * experts * 3 * hidden * width
        return _Work(programs, math.ceil(rows / experts / tile.block_k), 6 * rows * hidden * width, num_bytes)
    columns, inner = {
        "gate_up": (width, hidden),
        "down": (hidden, width),
        "input_gradient": (hidden, 2 * width),
        "down_backward": (width, hidden),
    }[name]
    pair = 2 if name == "gate_up" else 1
    programs = (rows / tile.block_m + experts / 2) * math.ceil(columns / tile.block_n)
    num_bytes = 2 * rows * (inner + _EPILOGUE_BLOCKS[name] * columns) + 2 * experts * pair * columns * inner
    return _Work(programs, math.ceil(inner / tile.block_k), 2 * rows * pair * columns * inner, num_bytes)


def predict_product(product: Compiled, cell: Cell, card: str) -> tuple[float, float]:
    """Return seconds and TFLOP/s of one product.

    Args:
        product: A compiled kernel.
        cell: The layer.
        card: Of `CARDS`.
    """
    tile, work, per = product.tile, _work(product, cell), product.programs_per_multiprocessor
    pair = 2 if product.name == "gate_up" else 1
    step = max(
        2 * tile.block_m * tile.block_n * tile.block_k * pair / (_TENSOR / _MULTIPROCESSORS)
        * (1 if tile.uses_descriptor else _BY_POINTER),
        product.step_bytes / (_L2 / _MULTIPROCESSORS),
        _LATENCY / (per * product.blocks_in_flight),
    )  # fmt: skip
    written = 2 * tile.block_m * tile.block_n * _EPILOGUE_BLOCKS[product.name]
    ends = (_LATENCY + written / (_STORE / _MULTIPROCESSORS)) * (1 if per == 1 else _BESIDE_ANOTHER)
    seconds = max(work.programs / _MULTIPROCESSORS * (work.steps * step + ends), work.num_bytes / CARDS[card])
    return seconds, work.flop / seconds / 1e12


def predict_layer(products: dict[str, Compiled], cell: Cell, card: str) -> tuple[float, float]:
    """Return milliseconds of the forward and of the backward pass on the GPU, the host left out.

    Args:
        products: By name, all five.
        cell: The layer.
        card: Of `CARDS`.
    """
    seconds = {name: predict_product(product, cell, card)[0] for name, product in products.items()}
    # The sum over a token's rows, once in each pass.
    combine = 2 * cell.H * cell.T * (cell.K + 1) / CARDS[card]
    forward = sum(seconds[name] for name in _FORWARD) + combine + _SMALL_KERNELS
    backward = sum(s for name, s in seconds.items() if name not in _FORWARD) + combine + _SMALL_KERNELS
    return 1e3 * forward, 1e3 * backward


@cache
def compiled(name: str, tile: Tile) -> Compiled:
    """Compile one product for sm_90 with this tile.

    Args:
        name: Of `PRODUCTS`.
        tile: Sizes of the tiles.
    """
    tiles: Tiles = replace(SHIPPED["sm_90", 0, 0, 2], **{name: tile})
    return Compiled(name, tile, compile_products(tiles, name, TARGETS["sm_90"], torch.bfloat16))


def shipped_products() -> dict[str, Compiled]:
    """Return the five products with the tiles that ship for many rows."""
    tiles = SHIPPED["sm_90", 0, 0, 2]
    return {name: compiled(name, getattr(tiles, name)) for name in PRODUCTS}


def errors() -> dict[str, list[float]]:
    """Return the model's relative errors against what the H200 gave, by what the model had seen of it."""
    found: dict[str, list[float]] = {"32,768 tokens (fitted)": [], "4,096 tokens": []}
    for name, by_tile in _MEASURED_PRODUCTS.items():
        for tile, rates in zip(VARIANTS[name], by_tile, strict=False):
            for num_tokens, measured, kind in zip(_MEASURED_TOKENS, rates, found, strict=False):
                cell = Cell(num_tokens, 2048, 768, 128, 12)
                found[kind].append(predict_product(compiled(name, tile), cell, "H200")[1] / measured - 1)
    for cell, passes in _MEASURED_LAYERS.items():
        predicted = predict_layer(shipped_products(), cell, "H200")
        kind = "whole passes, 8,192 tokens and more" if cell.T >= 8192 else "whole passes, 4,096 tokens"
        found.setdefault(kind, []).extend([m / p - 1 for p, m in zip(predicted, passes, strict=True)])
    for cell, worked in _MEASURED_WORK.items():
        predicted_step = sum(predict_layer(shipped_products(), cell, "H200"))
        found.setdefault(f"what the card worked, {cell.T:,} tokens", []).append(worked / predicted_step - 1)
    return found


def report() -> tuple[list[dict[str, object]], str]:
    """Return the predictions and their errors, as rows and as a table."""
    products, rows = shipped_products(), []
    lines = ["| T, H, I, E, K | card | " + " | ".join(PRODUCTS) + " | forward | backward | both |"]
    lines.append("| --- " * (len(PRODUCTS) + 5) + "|")
    for cell in _MEASURED_LAYERS:
        for card in CARDS:
            rates = {name: predict_product(product, cell, card)[1] for name, product in products.items()}
            forward, backward = predict_layer(products, cell, card)
            flop = 6 * cell.T * cell.K * cell.H * cell.I / 1e9
            passes = {
                "forward": flop / forward,
                "backward": 2 * flop / backward,
                "both": 3 * flop / (forward + backward),
            }
            rows.append({"cell": cell.title, "card": card, **rates, **passes})
            figures = " | ".join(f"{rate:.0f}" for rate in (*rates.values(), *passes.values()))
            lines.append(f"| {cell.T}, {cell.H}, {cell.I}, {cell.E}, {cell.K} | {card} | {figures} |")
    lines += ["", "| against an H200 | figures | mean error | largest |", "| --- | --- | --- | --- |"]
    for kind, values in errors().items():
        sizes = [abs(value) for value in values]
        lines.append(f"| {kind} | {len(sizes)} | {sum(sizes) / len(sizes):.1%} | {max(sizes):.0%} |")
        rows.append({"against": kind, "errors": values})
    return rows, "\n".join(lines)


def against_measured(path: Path, products: dict[str, Compiled]) -> tuple[list[dict[str, object]], str]:
    """Return predicted beside measured milliseconds of every pass that a benchmark timed, as rows and as a table.

    Args:
        path: ``results.json`` of ``deepseek-moe bench kernels`` on one of `CARDS`; ``bench.json`` of
            ``dev/measure_on_gpu.sh`` is one.
        products: By name, all five.

    Raises:
        ValueError: It is no such file, of another card, or holds no pass that the model speaks of.
    """
    card, timed = _read_measured(path)
    rows: list[dict[str, object]] = []
    lines = ["| T, H, I, E, K | pass | predicted ms | measured ms | measured / predicted |"]
    lines.append("| --- " * 5 + "|")
    for row in timed:
        cell = Cell(*(row[name] for name in ("T", "H", "I", "E", "K")))
        forward, backward = predict_layer(products, cell, card)
        modes = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
        predicted, measured, stderr = modes[row["mode"]], row["ms"], row.get("ms_stderr", 0.0)
        rows.append({"cell": cell.title, "card": card, "pass": row["mode"], "predicted_ms": predicted})
        rows[-1] |= {"measured_ms": measured, "measured_ms_stderr": stderr}
        shape = f"{cell.T}, {cell.H}, {cell.I}, {cell.E}, {cell.K}"
        times = f"{predicted:.2f} | {measured:.2f} ± {stderr:.2f} | {measured / predicted:.2f}"
        lines.append(f"| {shape} | {row['mode']} | {times} |")
    errors_found = [abs(float(row["measured_ms"]) / float(row["predicted_ms"]) - 1) for row in rows]  # type: ignore[arg-type]
    mean = sum(errors_found) / len(errors_found)
    lines.append(f"{card}, {len(rows)} passes: mean error {mean:.1%}, largest {max(errors_found):.0%}")
    return rows, "\n".join(lines)


def _read_measured(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The card, and the rows of `fused_moe` in bf16 with balanced routing and tiles of many rows."""
    results = read_object(path, "measured")
    gpu, rows = results.get("gpu"), results.get("rows")
    card = next((card for card in CARDS if isinstance(gpu, str) and card in gpu), None)
    if card is None:
        raise ValueError(f"measured: got {path} of {gpu or 'no named GPU'}, expected one of {', '.join(CARDS)}")
    wanted = {"implementation": "fused_moe", "dtype": "bfloat16", "routing": "balanced"}
    found = [
        row
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict) and "ms" in row and all(row.get(key) == value for key, value in wanted.items())
    ]
    found = [row for row in found if row["T"] * row["K"] > ROW_BUCKETS[-1] * row["E"]]
    if not found:
        raise ValueError(f"measured: got {path} without rows of fused_moe and many tokens, expected some")
    return card, found


def run(args: argparse.Namespace) -> int:
    """Print and save the predictions, or without ``--predict`` the table of what the kernels compile to.

    Args:
        args: The options of ``deepseek-moe bench compile``.
    """
    if not args.predict:
        if args.measured is not None:
            raise ValueError(f"measured: got {args.measured} without --predict, expected --predict as well")
        return compile_check.run(args)
    if args.measured is not None:
        _read_measured(Path(args.measured))  # before minutes of compiling
    settings = {"triton": triton.__version__, "measured": args.measured}
    bench = BenchmarkRun("compile", args.output, settings, overwrite=args.overwrite)
    rows, text = report()
    if args.measured is not None:
        more, table = against_measured(Path(args.measured), shipped_products())
        rows, text = rows + more, f"{text}\n\n{table}"
    print(text)
    bench.finish({"rows": rows}, text)
    return 0
