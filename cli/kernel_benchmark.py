"""Times experts implementations side by side; ``deepseek-moe bench kernels`` prints what this measures.

Every implementation runs in one process, in turn, on the same weights and the same routing, so that whatever else the
machine does hits all alike; the figure is the median. Surprising: implementations are those registered with
transformers' experts interface, plus ``eager``. Other projects register theirs there, and are measured if imported.

T tokens, K slots a token, H hidden, I expert width, E experts.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3 import modeling_deepseek_v3

import modeling_deepseek  # noqa: F401  registers fused_moe

MODES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Cell:
    """One shape and kind of routing: ``balanced``, ``skewed`` or ``dynamic`` (two thirds to all slots used)."""

    T: int
    H: int
    I: int  # noqa: E741
    E: int
    K: int
    routing: str = "balanced"
    dtype: str = "float32"

    @property
    def flops(self) -> int:
        """Of a forward pass; forward and backward together take three times as many."""
        return 6 * self.T * self.K * self.H * self.I


CPU_SHAPES = [(2048, 512, 256, 128, 12), (2048, 512, 256, 16, 4), (4096, 256, 128, 32, 4), (1024, 1024, 512, 64, 8)]
CPU_SHAPES += [(1, 1024, 512, 64, 8), (16, 1024, 512, 64, 8), (4096, 128, 96, 16, 4)]
CPU_GRID = [Cell(*shape, dtype=dtype) for shape in CPU_SHAPES for dtype in ("float32", "bfloat16")]
CPU_GRID += [Cell(4096, 256, 128, 32, 4, routing) for routing in ("skewed", "dynamic")]
_LARGE = [(32768, 2048, 768, 128, 12), (8192, 2048, 768, 128, 12), (32768, 4096, 1536, 128, 8)]
GPU_GRID = [Cell(*shape, dtype="bfloat16") for shape in _LARGE]
GPU_GRID += [Cell(*_LARGE[1], routing, "bfloat16") for routing in ("skewed", "dynamic")]
GPU_GRID += [Cell(T, 2048, 768, 128, 12, dtype="bfloat16") for T in (1, 4, 16, 64)]
QUICK_GRID = [Cell(64, 64, 48, 8, 2), Cell(64, 64, 48, 8, 2, "dynamic"), Cell(1, 64, 48, 8, 2, dtype="bfloat16")]


def make_routing(cell: Cell, device: str) -> tuple[Tensor, Tensor]:
    """Return indices and weights [T, K] from a fixed seed; an unused slot has index E and weight 0.

    Args:
        cell: The shape.
        device: Where to put them.
    """
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(cell.T, cell.E, generator=generator)
    if cell.routing == "skewed":  # Zipf: the first expert is chosen E times as often as the last
        scores = scores ** torch.arange(1, cell.E + 1)
    indices = scores.topk(cell.K).indices
    weights = torch.rand(cell.T, cell.K, generator=generator)
    if cell.routing == "dynamic":
        used = torch.randint(-(-2 * cell.K // 3), cell.K + 1, (cell.T, 1), generator=generator)
        is_unused = torch.arange(cell.K) >= used
        indices, weights = indices.masked_fill(is_unused, cell.E), weights.masked_fill(is_unused, 0)
    return indices.to(device), weights.to(device)


def measure_cell(cell: Cell, device: str, seconds: float) -> list[dict]:
    """Return one row per implementation and mode.

    Args:
        cell: What to run.
        device: ``cpu`` or ``cuda``.
        seconds: How long to go on, about, per mode.
    """
    dtype = getattr(torch, cell.dtype)
    config = DeepseekV3Config(
        hidden_size=cell.H, moe_intermediate_size=cell.I, n_routed_experts=cell.E, num_experts_per_tok=cell.K
    )
    with torch.device(device):
        experts = modeling_deepseek_v3.DeepseekV3Experts(config).to(dtype)
        x = torch.randn(cell.T, cell.H, dtype=dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    peak = _matmul_peak(dtype, device)
    rows = []
    for mode in MODES:
        if mode != "forward" and device == "cuda" and cell.T <= 64:
            continue  # decoding has no backward pass
        steps, skipped = {}, {}
        for name in ("eager", *ALL_EXPERTS_FUNCTIONS.keys()):
            step = _make_step(experts, cell, name, x, mode)
            reason = _reason_to_skip(cell, name, dtype, device) or _first_failure(step)
            if reason is None:
                steps[name] = step
            else:
                skipped[name] = reason
        times = _interleave(steps, seconds, device)
        factor = 1 if mode == "forward" else 3
        for name, milliseconds in times.items():
            teraflops = factor * cell.flops / milliseconds / 1e9
            rows.append(
                {
                    **asdict(cell),
                    "device": device,
                    "mode": mode,
                    "implementation": name,
                    "ms": milliseconds,
                    "tflops": teraflops,
                    "share_of_matmul_peak": teraflops / peak,
                    "kept_bytes_per_token": None if mode == "forward" else _kept_bytes(steps[name], experts) / cell.T,
                    "peak_memory_bytes": _peak_memory(steps[name], device),
                }
            )
        rows += [
            {**asdict(cell), "device": device, "mode": mode, "implementation": name, "skipped": reason}
            for name, reason in skipped.items()
        ]
    return rows


def _make_step(experts, cell: Cell, name: str, x: Tensor, mode: str) -> Callable[[], Tensor]:
    indices, weights = make_routing(cell, x.device)
    if name not in ("eager", "fused_moe"):
        # transformers' own implementations cannot take an unused slot; its models give it an expert and no weight.
        indices = indices.where(indices < cell.E, 0)

    def step() -> Tensor:
        experts.config._experts_implementation = name
        if mode == "forward":
            with torch.no_grad():
                return experts(x, indices, weights)
        experts.zero_grad()
        leaf, router = x.detach().requires_grad_(), weights.detach().requires_grad_()
        output = experts(leaf, indices, router)
        output.backward(x)
        return output

    return step


def _reason_to_skip(cell: Cell, name: str, dtype: torch.dtype, device: str) -> str | None:
    if name == "batched_mm":
        num_bytes = 3 * cell.T * cell.K * cell.H * cell.I * dtype.itemsize
        if num_bytes > (2 * 2**30 if device == "cpu" else 32 * 2**30):
            return f"would copy {num_bytes / 2**30:.0f} GiB of weights"
    return None


def _first_failure(step: Callable[[], Tensor]) -> str | None:
    """Run once, as warm-up; the reason if the implementation cannot run here."""
    try:
        step()
    except (ImportError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return None


def _interleave(steps: dict[str, Callable], seconds: float, device: str) -> dict[str, float]:
    """Median milliseconds of each; the slow ones fewer times.

    Every round has an order of its own: in a fixed one, whoever follows the copies of ``batched_mm`` always meets a
    cold cache (0.87 instead of 0.95 of the best at one token in bf16).
    """
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    begun, spent = time.perf_counter(), dict.fromkeys(steps, 0.0)
    while True:
        for name, step in order.sample(list(steps.items()), len(steps)):
            # One run of an implementation that takes five times the whole allowance tells enough.
            if (len(samples[name]) >= 3 and spent[name] > seconds / 2) or spent[name] > 5 * seconds:
                continue
            _synchronize(device)
            start = time.perf_counter()
            step()
            _synchronize(device)
            samples[name].append(time.perf_counter() - start)
            spent[name] += samples[name][-1]
        is_measured = all(len(times) >= 3 or spent[name] > 5 * seconds for name, times in samples.items())
        if max(map(len, samples.values())) >= 200 or (is_measured and time.perf_counter() - begun > seconds):
            return {name: 1e3 * statistics.median(times) for name, times in samples.items()}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _matmul_peak(dtype: torch.dtype, device: str) -> float:
    """TFLOP/s of a large square product on this machine."""
    size = 8192 if device == "cuda" else 1536
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    milliseconds = _interleave({"mm": lambda: left @ right}, 0.3, device)["mm"]
    return 2 * size**3 / milliseconds / 1e9


def _kept_bytes(step: Callable, experts) -> int:
    """Bytes kept from the forward to the backward pass, parameters left out."""
    own = {parameter.data_ptr() for parameter in experts.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())


def _peak_memory(step: Callable, device: str) -> int | None:
    """Highest allocation of a step beyond what was there before; GPUs only, a CPU allocator keeps no such count."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
