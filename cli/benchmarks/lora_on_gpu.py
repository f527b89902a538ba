"""Adapters on the experts of one layer on a GPU: what a step takes beside frozen, folded and fully trained experts.

    python -m deepseek_cli.benchmarks.lora_on_gpu --output FOLDER

Four steps, forward and backward, on the same weights and routing, in turn within one process:

    frozen   `fused_moe`, the gradient of the input alone
    lora     the factors inside `fused_moe`; gradients of the input and of both pairs of factors
    full     the gradients of the input and of both projections
    fold     PEFT's way: ``W + scaling B A`` is built, then the step of ``full``, then the factors' gradients

Before anything is timed the gradients of ``lora`` are held against those of ``fold``. Writes ``lora_on_gpu.json``
after every batch size, and prints a table, what a step of the fewest tokens takes host and device (``host_cost``), and
the time of each kernel of a LoRA step. Processes of their own compile ahead, as in ``kernel_variants``;
``--compile-only`` ends after that.

T tokens, K slots per token, H hidden, I expert width, E experts, r rank.
"""

import argparse
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from deepseek_cli.benchmarks.compile_ahead import compile_in_processes, compile_instead_of_launching
from deepseek_cli.benchmarks.host_cost import device_us, host_us
from deepseek_cli.benchmarks.kernel_memory import peak_memory
from deepseek_cli.benchmarks.kernel_timing import Mark, interleave
from deepseek_kernels.expert_loop import largest_tile_error
from deepseek_kernels.fused_moe import fused_moe
from deepseek_kernels.gpu import experts as experts_gpu
from deepseek_kernels.gpu.adapters import NO_ADAPTERS, make_adapters
from deepseek_kernels.gpu.tiles import SHIPPED
from deepseek_kernels.lora import LoraFactors

KINDS = ("frozen", "lora", "full", "fold")
FILE = "lora_on_gpu.json"
# Of a 128 x 128 block: the fold rounds the sum of weight and factors to bf16, which here is in the result.
_TOLERANCE = 6e-2


@dataclass(frozen=True)
class Shape:
    """Sizes of the layer and its batches."""

    tokens: tuple[int, ...] = (1024, 8192, 32768)
    K: int = 8
    H: int = 2048
    I: int = 768  # noqa: E741
    E: int = 128
    r: int = 16


SMALL = Shape((20, 40), 2, 32, 16, 4, 4)


class Layer:
    """Random experts with factors, of order one; every expert gets as many rows as the next, give or take one.

    Args:
        shape: Sizes.
        device: ``cuda``, or ``cpu`` under Triton's interpreter.
    """

    def __init__(self, shape: Shape, device: str) -> None:
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(0)
        E, H, I, r = shape.E, shape.H, shape.I, shape.r  # noqa: E741
        self.projections = [self._normal(E, 2 * I, H) / H**0.5, self._normal(E, H, I) / I**0.5]
        self.factors = [
            LoraFactors(self._normal(E * r, N) / N**0.5, self._normal(M, r * E) / r**0.5, 2.0)
            for N, M in ((H, 2 * I), (I, H))
        ]

    def _normal(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device=self.device, dtype=torch.bfloat16)

    def steps(self, num_tokens: int) -> dict[str, Callable[[Mark], object]]:
        """Return the four steps at one number of tokens; each returns output and gradients.

        Args:
            num_tokens: T.
        """
        x, grad = (self._normal(num_tokens, self.shape.H) for _ in range(2))
        num_rows = num_tokens * self.shape.K
        order = torch.randperm(num_rows, generator=self.generator, device=self.device) % self.shape.E
        ids = order.view(num_tokens, self.shape.K)
        weights = torch.rand(ids.shape, generator=self.generator, device=self.device)

        def step(kind: str, mark: Mark) -> list[Tensor]:
            leaf = x.detach().requires_grad_()
            projections = [one.detach().requires_grad_(kind == "full") for one in self.projections]
            pairs = [
                LoraFactors(one.a.detach().requires_grad_(), one.b.detach().requires_grad_(), one.scaling)
                for one in self.factors
            ]
            of_factors = [t for pair in pairs for t in (pair.a, pair.b)]
            leaves = [leaf, *{"frozen": [], "full": projections}.get(kind, of_factors)]
            mark()
            used = [_folded(*pair) for pair in zip(projections, pairs, strict=True)] if kind == "fold" else projections
            first, second = pairs if kind == "lora" else (None, None)
            output = fused_moe(leaf, used[0], used[1], ids, weights, gate_up_lora=first, down_lora=second)
            mark()
            grads = torch.autograd.grad(output, leaves, grad)
            mark()
            return [output.detach(), *grads]

        return {kind: functools.partial(step, kind) for kind in KINDS}


def _folded(weight: Tensor, factors: LoraFactors) -> Tensor:
    """``W + scaling B A`` of every expert, by the one product with which PEFT builds it."""
    num_experts = weight.shape[0]
    a = factors.a.view(num_experts, -1, weight.shape[2])
    b = factors.b.view(weight.shape[1], -1, num_experts).permute(2, 0, 1)
    return torch.baddbmm(weight, b, a, alpha=factors.scaling)


def _ignore() -> None:
    """A mark that marks nothing."""


def largest_error(steps: dict[str, Callable[[Mark], Any]]) -> float:
    """Return the largest error of a block of the LoRA step's results against the fold's.

    Args:
        steps: From `Layer.steps`.
    """
    pairs = zip(steps["lora"](_ignore), steps["fold"](_ignore), strict=True)
    return max(largest_tile_error(one, other) for one, other in pairs)


def measure(layer: Layer, num_tokens: int, seconds: float) -> dict[str, Any]:
    """Return milliseconds, standard errors and peak memory of each kind, and how far LoRA is from the fold.

    Args:
        layer: With its factors.
        num_tokens: T.
        seconds: How long to go on, about.
    """
    steps = layer.steps(num_tokens)
    row: dict[str, Any] = {"T": num_tokens, "error": largest_error(steps)}
    for kind, step in steps.items():
        step(_ignore)
        row[kind] = {"peak_bytes": peak_memory(functools.partial(step, _ignore), layer.device)}
    for kind, (forward, backward, total) in interleave(steps, seconds, layer.device).items():
        row[kind] |= {"ms": total.ms, "ms_stderr": total.stderr, "num_rounds": total.num_rounds}
        row[kind] |= {"forward_ms": forward.ms, "backward_ms": backward.ms}
    return row


def measure_parts(layer: Layer, num_tokens: int) -> dict[str, dict[str, list[float]]]:
    """Return what forward and backward of each kind take the host and the device, in microseconds.

    Args:
        layer: With its factors.
        num_tokens: T.
    """
    steps = layer.steps(num_tokens)
    return {
        kind: {"host_us": host_us(step, layer.device), "device_us": device_us(step, layer.device)}
        for kind, step in steps.items()
    }


def format_row(row: dict[str, Any]) -> str:
    """Return one row of the table.

    Args:
        row: From `measure`.
    """
    times = " | ".join(f"{row[kind]['ms']:.2f} ± {row[kind]['ms_stderr']:.2f}" for kind in KINDS)
    ratios = " | ".join(f"{row['lora']['ms'] / row[kind]['ms']:.2f}" for kind in ("frozen", "full", "fold"))
    peaks = " | ".join(f"{(row[kind]['peak_bytes'] or 0) / 2**30:.2f}" for kind in KINDS)
    return f"| {row['T']} | {times} | {ratios} | {peaks} | {row['error']:.1e} |"


def print_kernels(layer: Layer, num_tokens: int) -> None:
    """Print how long each kernel of three LoRA steps ran.

    Args:
        layer: With its factors.
        num_tokens: T.
    """
    step = layer.steps(num_tokens)["lora"]
    step(_ignore)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step(_ignore)
        torch.cuda.synchronize()
    table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=20, max_name_column_width=60)
    print(f"lora, three steps of {num_tokens} tokens\n{table}", flush=True)


def compile_ahead(shape: Shape) -> None:
    """Compile what the steps will launch, by one process for each bucket of rows and each part of a step.

    Args:
        shape: Sizes.
    """
    buckets = {_bucket(shape, num_tokens) for num_tokens in shape.tokens}
    # The forward pass of frozen experts is that of full training.
    parts = [("full", 0), ("full", 1), ("frozen", 1), ("lora", 0), ("lora", 1)]
    jobs = [(shape, bucket, *part) for bucket in sorted(buckets) for part in parts]
    compile_in_processes([(_compile, job) for job in jobs])


def _bucket(shape: Shape, num_tokens: int) -> int:
    return experts_gpu.row_bucket(num_tokens * shape.K, shape.E)


def _compile(shape: Shape, bucket: int, kind: str, part: int) -> None:
    compile_instead_of_launching()
    experts_gpu.choose_tiles = lambda *arguments: SHIPPED["sm_90", 0, 0, bucket]
    E, H, I, r, K = shape.E, shape.H, shape.I, shape.r, shape.K  # noqa: E741
    x, gate_up, down = (torch.empty(n, dtype=torch.bfloat16) for n in ((64, H), (E, 2 * I, H), (E, H, I)))
    ids, weights, text = torch.zeros(64, K, dtype=torch.int64), torch.ones(64, K), "silu"
    factors = [x.new_empty(size) for N, M in ((H, 2 * I), (I, H)) for size in ((E * r, N), (M, r * E))]
    rows = [x.new_empty(64 * K, r) for _ in range(2)]
    pair = make_adapters(factors, (2.0, 2.0), rows, E) if kind == "lora" else NO_ADAPTERS
    if part == 0:
        experts_gpu.forward(x, gate_up, down, ids, weights, text, True, None, pair)
        return
    order = experts_gpu.routing_metadata(ids, E, SHIPPED["sm_90", 0, 0, bucket].block_m)
    kept, needs_weights = x.new_empty(64 * K, 2 * I), kind == "full"
    needs = [True, needs_weights, needs_weights, False, False]
    experts_gpu.backward(x, x, gate_up, down, order, weights, kept, text, needs, pair)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile, check, measure and write.

    Args:
        arguments: Of the command line; None for the process's own.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("."))
    parser.add_argument("--seconds", type=float, default=0.7, help="how long to time each number of tokens, about")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also under Triton's interpreter")
    parser.add_argument("--compile-only", action="store_true")
    args = parser.parse_args(arguments)
    device, shape = "cuda" if torch.cuda.is_available() else "cpu", SMALL if args.small else Shape()
    if device == "cuda":
        compile_ahead(shape)
    if args.compile_only:
        return
    name = torch.cuda.get_device_name() if device == "cuda" else "interpreter"
    layer, rows = Layer(shape, device), []
    print(f"{name}, torch {torch.__version__}, {shape}, bf16")
    print(
        "| T | frozen, ms | lora, ms | full, ms | fold, ms | lora / frozen | / full | / fold | peak GiB: frozen | "
        "lora | full | fold | error |"
    )
    print("| " + " | ".join(["---"] * 13) + " |")
    args.output.mkdir(parents=True, exist_ok=True)
    for num_tokens in shape.tokens:
        rows.append(measure(layer, num_tokens, args.seconds))
        print(format_row(rows[-1]), flush=True)
        figures = {"device": name, "torch": torch.__version__, "shape": vars(shape), "rows": rows}
        (args.output / FILE).write_text(json.dumps(figures, indent=1), encoding="utf-8")
        if num_tokens == shape.tokens[0]:
            rows[-1]["parts"] = measure_parts(layer, num_tokens)
    (args.output / FILE).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print("kind: host us, device us, forward and backward at the fewest tokens")
    for kind, part in rows[0]["parts"].items():
        print(kind, *(f"{us:.0f}" for name in ("host_us", "device_us") for us in part[name]), flush=True)
    worst = max(row["error"] for row in rows)
    if worst > _TOLERANCE:
        print(f"lora is off by {worst:.1e} of a block, expected at most {_TOLERANCE:.0e}: the times mean nothing")
    if device == "cuda":
        for num_tokens in (shape.tokens[0], shape.tokens[-1]):
            print_kernels(layer, num_tokens)


if __name__ == "__main__":
    main()
