"""Experts in 4 bits beside bf16 on one GPU: milliseconds of a layer, by codes and by dense copies, and their memory.

    python -m deepseek_cli.benchmarks.four_bit_on_gpu --output FOLDER

Forward passes run in CUDA graphs of several calls, each with a layer and a routing of its own, so that no call finds
its weights in the cache; training steps run as they are. Variants take turns; one is timed only if it gives, block by
block, what the bf16 kernels give on the weights that its codes stand for. Before that several processes compile all
kernels, for in one compiling takes longer than timing. Writes ``four_bit.json`` after every number of tokens.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from deepseek_cli.benchmarks.compile_ahead import compile_in_processes
from deepseek_cli.benchmarks.kernel_timing import Mark, interleave
from deepseek_kernels.expert_loop import TILE_TOLERANCE, largest_tile_error
from deepseek_kernels.four_bit import FourBitFormat, PackedMatrices
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.fused_moe_four_bit import fused_moe_four_bit
from deepseek_kernels.gpu import experts as experts_gpu
from deepseek_kernels.gpu import four_bit_experts
from deepseek_kernels.gpu.four_bit_dequantize import dense
from deepseek_kernels.gpu.four_bit_experts import BY_ROWS, PackedTiles
from deepseek_kernels.gpu.tiles import Tile

TOKENS = (1, 4, 16, 64, 1024, 8192)
COPIES_FROM = 64
NUM_LAYERS, NUM_CALLS = 4, 8
# Beside the tiles that ship, for int4: narrower, longer and wider blocks.
OTHER_TILES = {
    1: {
        "64 columns": PackedTiles(Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3)),
        "256 inner": PackedTiles(Tile(16, 32, 256, 4, 3), Tile(16, 64, 256, 4, 3)),
        "16 columns": PackedTiles(Tile(16, 16, 256, 2, 3), Tile(16, 32, 256, 4, 3)),
    },
    16: {
        "32 columns": PackedTiles(Tile(16, 32, 128, 4, 4), Tile(16, 64, 128, 4, 4)),
        "256 inner": PackedTiles(Tile(16, 64, 256, 8, 3), Tile(16, 64, 256, 4, 3)),
        "4 stages": PackedTiles(Tile(16, 64, 128, 4, 4), Tile(16, 128, 128, 4, 4)),
    },
    1024: {
        "8 warps": PackedTiles(Tile(64, 64, 128, 8, 3), Tile(64, 128, 128, 8, 3)),
        "128 columns": PackedTiles(Tile(64, 128, 128, 8, 3), Tile(64, 128, 128, 4, 3)),
        "16 rows": PackedTiles(Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3)),
    },
}
Stacks = tuple[Any, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer."""

    H: int = 2048
    I: int = 768  # noqa: E741
    E: int = 128
    K: int = 8


@dataclass(frozen=True)
class Variant:
    """One way to compute a layer.

    Attributes:
        form: ``bf16``, ``int4`` or ``nf4``.
        way: ``codes``, ``copies`` or, for bf16, nothing.
        tiles: In place of those that ship; by codes only.
        tiles_name: What tells them.
    """

    form: str
    way: str = ""
    tiles: PackedTiles | None = None
    tiles_name: str = ""

    @property
    def title(self) -> str:
        """What the table calls it."""
        return " ".join(word for word in (self.form, self.way, self.tiles_name) if word)


def variants_for(num_tokens: int) -> list[Variant]:
    """Return what is timed at this many tokens.

    Args:
        num_tokens: T.
    """
    found = [Variant("bf16"), *(Variant(form, "codes") for form in BY_ROWS)]
    if num_tokens >= COPIES_FROM:
        found += [Variant(form, "copies") for form in BY_ROWS]
    others = OTHER_TILES.get(num_tokens, {})
    return found + [Variant("int4", "codes", tiles, name) for name, tiles in others.items()]


class Bench:
    """Layers of random weights in every form, and their inputs.

    Args:
        shape: Of a layer.
        num_layers: How many of each form.
        device: ``cuda``, or ``cpu`` in a process started with TRITON_INTERPRET=1.
    """

    def __init__(self, shape: Shape, num_layers: int, device: str) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(0)
        sizes = ((shape.E, 2 * shape.I, shape.H), (shape.E, shape.H, shape.I))
        self.layers: dict[str, list[Stacks]] = {
            form: [(self._pack(form, sizes[0]), self._pack(form, sizes[1])) for _ in range(num_layers)]
            for form in BY_ROWS
        }
        self.layers["bf16"] = [(dense(one), dense(other)) for one, other in self.layers["int4"]]

    def _pack(self, form: str, size: tuple[int, ...]) -> PackedMatrices:
        """Random codes, and scales that make products of order one."""
        fmt = FourBitFormat.of(4, form, None)
        codes, scales = fmt.empty(size, torch.bfloat16, self.device)
        codes.view(torch.uint8).random_(0, 256, generator=self.generator)
        spread = (0.56 if form == "nf4" else 4.6) * size[2] ** 0.5
        scales.uniform_(0.75 / spread, 1.25 / spread, generator=self.generator)
        return PackedMatrices(codes, scales, size, fmt, torch.bfloat16)

    def inputs(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return x, indices of distinct experts per token and router weights.

        Args:
            num_tokens: T.
        """
        settings: dict[str, Any] = {"generator": self.generator, "device": self.device}
        x = torch.randn(num_tokens, self.shape.H, **settings).to(torch.bfloat16)
        ids = torch.rand(num_tokens, self.shape.E, **settings).topk(self.shape.K).indices
        return x, ids, torch.rand(num_tokens, self.shape.K, **settings)

    def run(self, variant: Variant, layer: int, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Return a layer's output.

        Args:
            variant: How.
            layer: Which.
            x: [T, H].
            ids: [T, K].
            weights: [T, K].
        """
        stacks = self.layers[variant.form][layer % len(self.layers[variant.form])]
        if variant.form == "bf16":
            return fused_moe(x, *stacks, ids, weights)
        experts_gpu.packed_tiles = lambda *operands: _tiles(variant, *operands)
        try:
            return fused_moe_four_bit(x, *stacks, ids, weights)
        finally:
            experts_gpu.packed_tiles = four_bit_experts.packed_tiles

    def error(self, variant: Variant, x: Tensor, ids: Tensor, weights: Tensor) -> float:
        """Return the largest error of a block against the bf16 kernels on the same weights.

        Args:
            variant: How.
            x: [T, H].
            ids: [T, K].
            weights: [T, K].
        """
        if variant.form == "bf16":
            return 0.0
        stacks = [dense(one) for one in self.layers[variant.form][0]]
        wanted = fused_moe(x, stacks[0], stacks[1], ids, weights)
        return largest_tile_error(self.run(variant, 0, x, ids, weights), wanted)


def _tiles(variant: Variant, x: Tensor, gate_up: Any, down: Any, ids: Tensor) -> PackedTiles | None:
    """The tiles of a variant: none for copies, and those for the most rows where copies would ship."""
    if variant.way == "copies":
        return None
    return variant.tiles or four_bit_experts.packed_tiles(x, gate_up, down, ids) or BY_ROWS[variant.form][-1]


def make_steps(bench: Bench, num_tokens: int, variants: list[Variant]) -> dict[str, Callable[[Mark], object]]:
    """Return a forward step of several calls for each variant, as a graph on a GPU.

    Args:
        bench: Layers.
        num_tokens: T.
        variants: What is timed.
    """
    inputs = [bench.inputs(num_tokens) for _ in range(NUM_CALLS)]
    steps: dict[str, Callable[[Mark], object]] = {}
    for variant in variants:

        def calls(variant: Variant = variant) -> None:
            for layer, operands in enumerate(inputs):
                bench.run(variant, layer, *operands)

        replay: Callable[[], object] = calls
        if bench.device == "cuda":
            calls()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                calls()
            replay = graph.replay

        def step(mark: Mark, replay: Callable[[], object] = replay) -> None:
            mark()
            replay()
            mark()

        steps[variant.title] = step
    return steps


def make_training_steps(bench: Bench, num_tokens: int, variants: list[Variant]) -> dict[str, Callable[[Mark], object]]:
    """Return forward and backward passes, of the input's gradient alone, for each variant.

    Args:
        bench: Layers.
        num_tokens: T.
        variants: What is timed.
    """
    x, ids, weights = bench.inputs(num_tokens)
    x.requires_grad_()
    grad, steps = torch.randn_like(x), dict[str, Callable[[Mark], object]]()
    for variant in variants:

        def step(mark: Mark, variant: Variant = variant) -> None:
            mark()
            output = bench.run(variant, 0, x, ids, weights)
            torch.autograd.grad(output, x, grad)
            mark()

        steps[variant.title] = step
    return steps


def measure(bench: Bench, num_tokens: int, seconds: float, *, is_training: bool) -> list[dict[str, Any]]:
    """Return a row per variant.

    Args:
        bench: Layers.
        num_tokens: T.
        seconds: How long to go on.
        is_training: Whether the input's gradient is taken too.
    """
    sample, rows, right = bench.inputs(num_tokens), [], []
    for variant in variants_for(num_tokens):
        if is_training and variant.tiles is not None:
            continue
        row: dict[str, Any] = {"T": num_tokens, "is_training": is_training, "variant": variant.title}
        rows.append(row | {"tiles": asdict(variant.tiles) if variant.tiles else None})
        try:
            error = rows[-1]["tile_error"] = bench.error(variant, *sample)
        except (OutOfResources, PTXASError, RuntimeError) as failure:
            error = rows[-1]["tile_error"] = float("inf")
            rows[-1]["failed"] = f"{type(failure).__name__}: {failure}"[:300]
        if error <= TILE_TOLERANCE[torch.bfloat16]:
            right.append(variant)
    steps = (make_training_steps if is_training else make_steps)(bench, num_tokens, right)
    for step in steps.values():  # the check ran no backward pass, and a graph runs slower the first time
        step(lambda: None)
    timings = interleave(steps, seconds, bench.device)
    num_calls = 1 if is_training else NUM_CALLS
    for row in rows:
        if row["variant"] in timings:
            total = timings[row["variant"]][-1]
            row["ms"], row["ms_stderr"] = total.ms / num_calls, total.stderr / num_calls
            row["num_rounds"] = total.num_rounds
    return rows


def measure_memory(bench: Bench, num_tokens: int) -> list[dict[str, Any]]:
    """Return, for each form as it ships, bytes per weight and what a forward and a training pass take beside weights.

    Args:
        bench: Layers, on a GPU.
        num_tokens: T.
    """
    rows = []
    x, ids, weights = bench.inputs(num_tokens)
    num_weights = 3 * bench.shape.E * bench.shape.I * bench.shape.H
    for form, layers in bench.layers.items():
        tensors = [t for one in layers[0] for t in ((one,) if isinstance(one, Tensor) else (one.codes, one.scales))]
        row: dict[str, Any] = {"T": num_tokens, "form": form}
        row["bytes_per_weight"] = sum(t.numel() * t.element_size() for t in tensors) / num_weights
        layer = fused_moe if form == "bf16" else fused_moe_four_bit
        for name, needs_grad in (("forward_gib", False), ("training_gib", True)):
            operand = x.detach().requires_grad_(needs_grad)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            output = layer(operand, *layers[0], ids, weights)
            if needs_grad:
                torch.autograd.grad(output, operand, torch.ones_like(output))
            row[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            del output
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a table in Markdown, each with its speed against bf16.

    Args:
        rows: From `measure`.
    """
    lines = ["| tokens | pass | variant | ms | bf16 / this | tile error |", "| --- | --- | --- | --- | --- | --- |"]
    bf16 = {(r["T"], r["is_training"]): r.get("ms") for r in rows if r["variant"] == "bf16"}
    for row in rows:
        pass_name, reference = (
            "forward and dx" if row["is_training"] else "forward",
            bf16[row["T"], row["is_training"]],
        )
        ms, ratio = "not timed", ""
        if "ms" in row:
            ms = f"{row['ms']:.4f} ± {row['ms_stderr']:.4f}"
            ratio = f"{reference / row['ms']:.2f}" if reference else ""
        lines.append(f"| {row['T']} | {pass_name} | {row['variant']} | {ms} | {ratio} | {row['tile_error']:.1e} |")
    return "\n".join(lines)


def compile_ahead(shape: Shape) -> None:
    """Run every variant once, by a process per number of tokens, into Triton's cache on disk.

    Args:
        shape: Of a layer.
    """
    jobs = [(num_tokens, part) for num_tokens in TOKENS for part in range(2)]
    compile_in_processes([(_compile, (shape, *job)) for job in jobs])


def _compile(shape: Shape, num_tokens: int, part: int) -> None:
    bench = Bench(shape, 1, "cuda")
    operands = bench.inputs(num_tokens)
    for variant in variants_for(num_tokens)[part::2]:
        try:
            bench.run(variant, 0, *operands)
        except (OutOfResources, PTXASError, RuntimeError) as failure:
            print(f"{variant.title}: {type(failure).__name__}: {failure}"[:300], flush=True)
            continue
        if num_tokens == TOKENS[-1]:
            x = operands[0].detach().requires_grad_()
            torch.autograd.grad(bench.run(variant, 0, x, *operands[1:]), x, torch.ones_like(x))


def main(arguments: list[str] | None = None) -> None:
    """Compile, measure and write.

    Args:
        arguments: In place of the command line's.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=0.4, help="for each number of tokens")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    shape, begun = Shape(), time.time()
    compile_ahead(shape)
    bench = Bench(shape, NUM_LAYERS, "cuda")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    result |= {"shape": asdict(shape), "num_layers": NUM_LAYERS, "rows": [], "memory": []}

    def write() -> None:
        (args.output / "four_bit.json").write_text(json.dumps(result, indent=1), encoding="utf-8")

    for num_tokens, is_training in [*((t, False) for t in TOKENS), (TOKENS[-1], True)]:
        result["rows"] += measure(bench, num_tokens, args.seconds, is_training=is_training)
        write()
    result["memory"] = measure_memory(bench, TOKENS[-1])
    result["seconds"] = time.time() - begun
    write()
    print(table(result["rows"]))
    print("\n".join(map(json.dumps, result["memory"])))
    print(f"{result['seconds']:.0f} s")


if __name__ == "__main__":
    main()
