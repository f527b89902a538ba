"""Times experts implementations side by side; ``deepseek-moe bench kernels`` prints what this measures.

Every implementation runs in one process, in turn, on the same weights and the same routing, so that whatever else the
machine does hits all alike; the figure is the median. Before that, output and gradients of each are held, tile by
tile, against a loop in float32: an implementation that computes something else is reported, not timed.
``forward`` is timed without gradients, as in inference, while ``backward`` is the second part of the step that
``forward+backward`` is the whole of.

T tokens, K slots per token, H hidden, I expert width, E experts.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from deepseek_cli.benchmarks.kernel_cells import Cell, make_routing
from deepseek_cli.benchmarks.kernel_memory import kept_bytes, peak_memory
from deepseek_cli.benchmarks.kernel_peers import Experts, make_experts, skips_unused
from deepseek_cli.benchmarks.kernel_timing import Mark, OtherWork, interleave
from deepseek_kernels.expert_loop import expert_loop, largest_tile_error
from deepseek_records.matmul_rate import measure_matmul_rate

_WORK = {"forward": 1, "backward": 2, "forward+backward": 3}  # in forward passes
# Of a tile's norm. The others may round the experts' outputs and the router weights once more than `fused_moe` does.
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 8e-3}
# FP8 rounds by 6.7e-2 of a layer's norm (23.5 dB) whatever the kernels, and a weight gradient's tile of an expert of
# two rows by 1.1e-1; the products themselves are held to 2e-2 by tests that round alike.
_FP8_TOLERANCE = 1.5e-1
_CAPTURABLE = ("fused_moe", "grouped_mm", "batched_mm")
# One replay between two marks of an idle stream would mostly measure the launch of the graph.
_REPLAYS = 20
_CANNOT_LOAD: dict[str, str] = {}


def measure_cell(cell: Cell, device: str, seconds: float, implementations: dict[str, Experts]) -> list[dict[str, Any]]:
    """Return one row per implementation and mode.

    Args:
        cell: What to run.
        device: ``cpu`` or ``cuda``.
        seconds: How long to go on, about, for inference and again for training.
        implementations: From `find_implementations`.
    """
    layer = _Layer(cell, device)
    peaks = {"matmul": _matmul_rate(layer.x.dtype, device), "copy": _copy_peak(device)}
    rows = []
    for is_training in (False, True):
        if is_training and device == "cuda" and cell.is_decode:
            continue  # decoding has no backward pass
        steps, skipped = _steps_that_agree(layer, implementations, is_training)
        graphs = _capture(steps) if device == "cuda" and cell.is_decode else {}
        other_work = OtherWork()
        timings = interleave({**steps, **graphs}, seconds, device)
        cores = other_work.cores()
        for name, (*parts, total) in timings.items():
            kept = layer.kept_bytes(name, implementations[name]) / cell.T if is_training else None
            memory = {
                "kept_bytes_per_token": kept,
                "peak_memory_bytes": layer.peak_memory(steps[name]),
                "is_cuda_graph": name in graphs,
                "other_work_cores": cores,
            }
            modes = {"backward": parts[1], "forward+backward": total} if is_training else {"forward": total}
            for mode, timing in modes.items():
                per_step = _REPLAYS if name in graphs else 1
                speed = layer.describe_speed(timing.ms / per_step, mode, peaks)
                speed |= {"ms_stderr": timing.stderr / per_step, "num_rounds": timing.num_rounds}
                rows.append({**layer.describe(mode, name), **speed, **memory})
        mode = "forward+backward" if is_training else "forward"
        rows += [{**layer.describe(mode, name), "skipped": reason} for name, reason in skipped.items()]
    return sorted(rows, key=lambda row: list(_WORK).index(row["mode"]))


class _Layer:
    """The experts of one cell with their input and routing."""

    def __init__(self, cell: Cell, device: str) -> None:
        dtype = getattr(torch, cell.dtype)
        with torch.device(device):
            experts = make_experts(hidden=cell.H, width=cell.I, num_experts=cell.E, num_slots=cell.K)
            self.experts = experts.to(dtype)
            generator = torch.Generator(device).manual_seed(0)
            self.x = torch.randn(cell.T, cell.H, generator=generator).to(dtype)
        for parameter in self.experts.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
        self.cell, self.device, self.routing = cell, device, make_routing(cell, device)

    def indices_for(self, name: str) -> Tensor:
        """[T, K] as an implementation can take them: not all can skip an unused slot."""
        return self.routing.mask_unused(self.cell.E) if skips_unused(name) else self.routing.indices

    def _leaves(self) -> tuple[Tensor, Tensor]:
        """Input and router weights, to take the gradients of one step."""
        return self.x.detach().requires_grad_(), self.routing.weights.detach().requires_grad_()

    def kept_bytes(self, name: str, implementation: Experts) -> int:
        """Bytes kept for the backward pass."""
        x, weights = self._leaves()
        indices = self.indices_for(name)
        return kept_bytes(lambda: implementation(self.experts, x, indices, weights), self.experts)

    def peak_memory(self, step: Callable[[Mark], list[Tensor]]) -> int | None:
        """Bytes a step takes at most; gradients of the step before are given up first."""
        self.experts.zero_grad()
        return peak_memory(lambda: step(_ignore), self.device)

    def make_step(self, name: str, implementation: Experts, is_training: bool) -> Callable[[Mark], list[Tensor]]:
        """A function that runs once, marks where its parts begin and end, and returns output and gradients."""
        indices = self.indices_for(name)

        def infer(mark: Mark) -> list[Tensor]:
            with torch.no_grad():
                mark()
                output = implementation(self.experts, self.x, indices, self.routing.weights)
                mark()
            return [output]

        def train(mark: Mark) -> list[Tensor]:
            self.experts.zero_grad()
            x, weights = self._leaves()
            mark()
            output = implementation(self.experts, x, indices, weights)
            mark()
            output.backward(self.x)
            mark()
            # At an unused slot of weight 0 the derivative is a matter of convention.
            weights.grad.masked_fill_(self.routing.is_unused, 0)
            return [output.detach(), x.grad, weights.grad, *(p.grad for p in self.experts.parameters())]

        return train if is_training else infer

    def reference(self, is_training: bool) -> list[Tensor]:
        """What a step returns, computed in float32 expert by expert."""
        indices, grad = self.routing.mask_unused(self.cell.E), self.x if is_training else None
        operands = (self.x, self.experts.gate_up_proj, self.experts.down_proj, indices, self.routing.weights)
        results = expert_loop(*operands, grad_output=grad)
        if not is_training:
            return results
        output, grad_x, grad_gate_up, grad_down, grad_weights = results
        return [output, grad_x, grad_weights, grad_gate_up, grad_down]

    def describe(self, mode: str, name: str) -> dict[str, Any]:
        """What says which row it is."""
        return {**asdict(self.cell), "device": self.device, "mode": mode, "implementation": name}

    def describe_speed(self, milliseconds: float, mode: str, peaks: dict[str, float]) -> dict[str, Any]:
        """Time and rates; work is that of the used slots, whoever computes the others too."""
        c = self.cell
        teraflops = _WORK[mode] * 6 * self.routing.num_used * c.H * c.I / milliseconds / 1e9
        speed = {"ms": milliseconds, "tflops": teraflops, "share_of_matmul_peak": teraflops / peaks["matmul"]}
        if c.is_decode and mode == "forward":
            weights = 3 * self.routing.num_experts_used * c.H * c.I * self.x.element_size()
            gigabytes_per_s = (weights + 2 * self.x.numel() * self.x.element_size()) / milliseconds / 1e6
            speed |= {"gb_per_s": gigabytes_per_s, "share_of_copy_peak": gigabytes_per_s / peaks["copy"]}
        return speed


def _steps_that_agree(
    layer: _Layer, implementations: dict[str, Experts], is_training: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run each once, as warm-up; return the steps that compute what the loop does, and why not the others."""
    steps, skipped, wanted = {}, {}, layer.reference(is_training)
    for name, implementation in implementations.items():
        reason = _reason_to_skip(layer.cell, name, layer.x.dtype, layer.device) or _CANNOT_LOAD.get(name)
        if reason is None:
            step = layer.make_step(name, implementation, is_training)
            try:
                results = step(_ignore)
            except Exception as error:  # Whatever another project raises where it cannot run is the answer.
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:160]
                if isinstance(error, ImportError | OSError):  # Asked again, transformers would look on the Hub again.
                    _CANNOT_LOAD[name] = reason
            else:
                reason = _difference(results, wanted, tolerance_of(name, layer.x.dtype))
                del results
        if reason is None:
            steps[name] = step
        else:
            skipped[name] = reason
    return steps, skipped


def tolerance_of(name: str, dtype: torch.dtype) -> float:
    """Return how far a 128 x 128 tile may be off the loop in float32, relative to its norm.

    Args:
        name: Of the implementation.
        dtype: Of its operands.
    """
    return _FP8_TOLERANCE if name == "fused_moe_fp8" else _TOLERANCE[dtype]


def _ignore() -> None:
    """Marks nothing."""


def _marked(run: Callable[[], object]) -> Callable[[Mark], None]:
    """A step of one part."""

    def step(mark: Mark) -> None:
        mark()
        run()
        mark()

    return step


def _difference(results: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> str | None:
    """What is wrong with the results, as the largest relative error of a tile, or None."""
    for what, got, want in zip(
        ("output", "grad of x", "grad of weights", "grad of gate_up_proj", "grad of down_proj"),
        results,
        wanted,
        strict=False,
    ):
        error = largest_tile_error(got, want)
        if not error <= tolerance:
            return f"differs from the loop in float32: {what} by {error:.1e} of a tile, allowed {tolerance:.0e}"
    return None


def _reason_to_skip(cell: Cell, name: str, dtype: torch.dtype, device: str) -> str | None:
    if name == "eager" and device == "cuda" and not cell.is_decode:
        return "its steps of a fifth of a second would leave the others few rounds"
    if name == "fused_moe_fp8" and device == "cpu":
        return "on a CPU it states accuracy and is slower than bf16"
    if name == "batched_mm":
        num_bytes = 3 * cell.T * cell.K * cell.H * cell.I * dtype.itemsize
        if num_bytes > (2 * 2**30 if device == "cpu" else 32 * 2**30):
            return f"would copy {num_bytes / 2**30:.0f} GiB of weights"
    return None


def _capture(steps: dict[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Steps replayed from a CUDA graph, as decoding is served, for whoever can be captured."""
    graphs = {}
    for name in set(_CAPTURABLE) & set(steps):
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        wanted = [tensor.clone() for tensor in steps[name](_ignore)]
        try:
            with torch.cuda.graph(graph):
                results = steps[name](_ignore)
        except Exception:  # It asks the device for a value, in whichever way: timed as it is, and its row says so.
            torch.cuda.set_stream(stream)  # A failed capture leaves its own in place.
            torch.cuda.synchronize()
            continue
        graph.replay()
        if _difference(results, wanted, 0.0) is not None:
            continue  # What it launched went by the capture.
        graphs[name] = _marked(functools.partial(_replay, graph))
    return graphs


def _replay(graph: torch.cuda.CUDAGraph) -> None:
    for _ in range(_REPLAYS):
        graph.replay()


@functools.cache
def _matmul_rate(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square product on this machine."""
    return measure_matmul_rate(torch.device(device), dtype) / 1e12


@functools.cache
def _copy_peak(device: str) -> float:
    """GB/s read and written together by a copy larger than any cache."""
    source = torch.zeros(2**30 if device == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median_ms(lambda: target.copy_(source), device) / 1e6


def _median_ms(run: Callable[[], object], device: str) -> float:
    run()  # warm-up
    return interleave({"": _marked(run)}, 0.3, device)[""][-1].ms
