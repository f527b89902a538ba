"""`fused_moe_fp8` beside `fused_moe` in bf16 on one GPU, whole layers and every kernel alone.

    python -m deepseek_cli.benchmarks.fp8_on_gpu --output FOLDER

Forward, and forward with backward, at three shapes: bf16, FP8 with the weights' codes made in each pass as
`fused_moe_fp8` makes them, and FP8 with those codes at hand, as if they were made once for many passes. The three run
in turn, in a new order each round; medians of CUDA events. Each step is queued behind idle work, so that the time of
the host, which launches more kernels for FP8, is not in it. Then each kernel alone, and other tiles for the products
of codes. Writes ``fp8_on_gpu.json`` after every shape, so that what was measured survives a time limit.

T tokens, H hidden, I expert width, E experts, K slots per token.
"""

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from deepseek_cli.benchmarks import fp8_kernels
from deepseek_cli.benchmarks.compile_ahead import compile_in_processes, compile_instead_of_launching
from deepseek_cli.benchmarks.fp8_layer import Layer, make_codes, teraflops
from deepseek_cli.benchmarks.kernel_timing import Mark, interleave
from deepseek_kernels.gpu import fp8_experts
from deepseek_kernels.gpu.fp8_tiles import MANY_ROWS, Fp8Tiles
from deepseek_kernels.gpu.tiles import ROW_BUCKETS, SHIPPED

SHAPES = ((32768, 2048, 768, 128, 8), (8192, 2048, 768, 128, 8), (8192, 7168, 2048, 64, 8))
_IDLE_CYCLES = 3_000_000
_PARTS = ("bf16", "fp8", "small", *fp8_kernels.VARIANTS)


def measure_layer(layer: Layer, seconds: float, device: str) -> list[dict[str, Any]]:
    """Return a row per implementation and mode.

    Args:
        layer: Its operands.
        seconds: How long to go on with each mode.
        device: ``cuda``, or ``cpu`` in the interpreter.
    """
    steps: dict[str, Callable[..., tuple[Any, ...]]] = {
        "bf16": layer.bf16_step,
        "fp8": partial(layer.fp8_step, (None, None)),
        "fp8, codes at hand": partial(layer.fp8_step, make_codes(layer.weights)),
    }
    likeness = _likeness(layer, steps)
    rows = []
    for is_training in (False, True):
        timings = interleave({n: _queued(step, is_training, device) for n, step in steps.items()}, seconds, device)
        for name, parts in timings.items():
            row: dict[str, Any] = {"shape": layer.shape, "implementation": name, "is_training": is_training}
            for part, timing in zip(("forward", "backward") if is_training else ("forward",), parts, strict=False):
                row[f"{part}_ms"] = timing.ms
            row |= {"ms": parts[-1].ms, "ms_stderr": parts[-1].stderr, "num_rounds": parts[-1].num_rounds}
            row["of_bf16"] = timings["bf16"][-1].ms / parts[-1].ms
            row["tflops"] = teraflops(layer.shape, 9 if is_training else 3, parts[-1].ms)
            rows.append(row | ({"decibels": likeness} if name == "fp8" else {}))
    return rows


def _queued(step: Callable[..., Any], is_training: bool, device: str) -> Callable[[Mark], object]:
    """The step behind idle work, so that the GPU never waits for the host."""

    def run(mark: Mark) -> object:
        if device == "cuda":
            torch.cuda._sleep(_IDLE_CYCLES)
        return step(is_training, mark)

    return run


def _likeness(layer: Layer, steps: dict[str, Callable[..., tuple[Any, ...]]]) -> dict[str, float]:
    """Signal to noise of FP8 against bf16 in decibels: what is timed has to be right."""
    wanted, got = (steps[name](True, lambda: None) for name in ("bf16", "fp8"))
    names = ("output", "hidden_states", "gate_up_proj", "down_proj", "topk_weights")
    found = {}
    for name, one, other in zip(names, wanted, got, strict=False):
        # By parts: a matrix of differences in fp32 may be as large as everything else.
        parts = list(zip(one.flatten().chunk(64), other.flatten().chunk(64), strict=True))
        signal = sum(part.float().square().sum().item() for part, _ in parts)
        noise = sum((part.float() - again.float()).square().sum().item() for part, again in parts)
        found[name] = 10 * math.log10(signal / noise) if noise else math.inf
    return found


def _layer_line(row: dict[str, Any]) -> str:
    mode = "forward + backward" if row["is_training"] else "forward"
    parts = f"({row['forward_ms']:.3f} + {row['backward_ms']:.3f})" if row["is_training"] else ""
    return (
        f"{row['shape']!s:<32} {mode:<19} {row['implementation']:<19} {row['ms']:8.3f} ms "
        f"+-{row['ms_stderr']:.3f} {parts:<19} {row['tflops']:6.0f} TFLOP/s {row['of_bf16']:5.2f} of bf16's speed"
    )


def _kernel_line(row: dict[str, Any]) -> str:
    head = f"{row['shape']!s:<32} {row['kernel']:<29} {row['tile'].removeprefix('Tile'):<104}"
    return f"{head} {row['ms']:8.3f} ms {row['tflops']:6.0f} TFLOP/s" if "ms" in row else f"{head} {row['failed']}"


def compile_in_parallel() -> None:
    """Compile all that will run into Triton's cache, by a process for each part; in one it takes minutes."""
    shapes = {shape[1:]: shape for shape in SHAPES}.values()
    # Tiles take longest: two processes for those of one kernel.
    parts = [(shape, p, first) for shape in shapes for p in _PARTS for first in range(1 + (p in fp8_kernels.VARIANTS))]
    compile_in_processes([(_compile, part) for part in parts])


def _compile(shape: tuple[int, ...], part: str, first: int) -> None:
    """Compile one part of what runs at one shape; T matters only in that it takes the tiles of many rows."""
    compile_instead_of_launching()
    fp8_experts.choose_fp8_tiles = lambda *arguments: MANY_ROWS
    fp8_experts.weight_gradient_tile = lambda *arguments: SHIPPED["sm_90", 0, 0, 2].weight_gradient
    num_tokens = (ROW_BUCKETS[-1] + 1) * shape[3] // shape[4] + 1
    layer = Layer.untouched((num_tokens, *shape[1:]))
    steps: dict[str, Callable[..., object]] = {"bf16": layer.bf16_step, "fp8": partial(layer.fp8_step, (None, None))}
    if part in steps:
        for is_training in (False, True):
            steps[part](is_training, lambda: None)
        return
    tiles = (
        [MANY_ROWS] if part == "small" else [Fp8Tiles(*[tile] * 4) for tile in fp8_kernels.VARIANTS[part][first::2]]
    )
    for chosen in tiles:
        found = fp8_kernels.kernels(layer, chosen)
        for name in found if part == "small" else (part,):
            try:
                found[name][1]()
            except fp8_kernels.FAILURES as error:
                print(f"{name}: {type(error).__name__}: {error}"[:300], flush=True)


def main() -> None:
    """Compile, measure, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each shape and mode")
    parser.add_argument("--milliseconds", type=int, default=15, help="for each kernel alone")
    parser.add_argument("--compile-only", action="store_true", help="fill Triton's cache and end")
    args = parser.parse_args()
    compile_in_parallel()
    if args.compile_only:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    found |= {"triton": triton.__version__, "layers": [], "kernels": [], "tiles": []}
    for shape in SHAPES:
        layer = Layer.make(shape, "cuda")
        for key, run, line in (
            ("layers", partial(measure_layer, layer, args.seconds, "cuda"), _layer_line),
            ("kernels", partial(fp8_kernels.measure_kernels, layer, args.milliseconds), _kernel_line),
            ("tiles", partial(fp8_kernels.measure_variants, layer, args.milliseconds), _kernel_line),
        ):
            if key == "tiles" and shape == SHAPES[1]:
                continue
            rows = run()
            found[key] += rows
            print("\n".join(map(line, rows)), flush=True)
            (args.output / "fp8_on_gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        del layer, run
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
