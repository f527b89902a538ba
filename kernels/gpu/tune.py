"""Find the fastest tiles for a shape on this machine's GPU, on request, and keep them for this user.

``deepseek-moe bench kernels --tune`` calls `tune` before it measures; nothing else does, so no training run ever stops
to time anything. Each kernel is timed alone on random inputs with balanced routing. The four kernels that walk rows
share a tile height, hence the best height is the one whose best four add up to the least.

Surprising: a candidate has to give the safe tiles' result before it is timed. Compilers have got single tile sizes
wrong without a NaN to show for it, and the fastest kernel is the one that leaves work out.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

from deepseek_kernels.expert_loop import largest_tile_error
from deepseek_kernels.gpu.device_guard import on_device_of
from deepseek_kernels.gpu.down_backward import down_backward
from deepseek_kernels.gpu.gate_up import gate_up
from deepseek_kernels.gpu.grouped_gemm import grouped_gemm
from deepseek_kernels.gpu.routing_metadata import RoutingMetadata, routing_metadata
from deepseek_kernels.gpu.tiles import ROW_KERNELS, SAFE, Tile, Tiles, device_name, row_bucket, save_tuned
from deepseek_kernels.gpu.weight_gradient import weight_gradient

logger = logging.getLogger(__name__)

# The shipped sizes and their neighbors; all compile for sm_90, which a slow test repeats. Only those with a limit of
# registers spill, a few bytes.
CANDIDATES = {
    "gate_up": (
        *(Tile(16, n, k, 4, s) for n, k, s in ((64, 128, 3), (64, 64, 4), (32, 128, 4))),
        *(Tile(64, n, k, w, s) for n, k, w, s in ((64, 64, 4, 4), (64, 64, 4, 3), (64, 32, 4, 4), (128, 64, 8, 3))),
        *(Tile(128, n, k, 8, s) for n, k, s in ((128, 64, 3), (64, 64, 4), (64, 64, 3), (128, 32, 4))),
        *(Tile(128, 128, 64, 8, s, uses_descriptor=True) for s in (3, 4)),
    ),
    "down": (
        *(Tile(16, n, k, 4, s) for n, k, s in ((64, 128, 4), (128, 64, 4), (64, 64, 5))),
        *(Tile(64, n, 64, w, s) for n, w, s in ((128, 4, 4), (64, 4, 4), (256, 8, 3))),
        *(Tile(128, n, k, 8, s) for n, k, s in ((256, 64, 3), (128, 64, 3), (128, 64, 4), (256, 32, 4))),
        *(Tile(128, n, 64, 8, s, uses_descriptor=True) for n, s in ((256, 3), (256, 4), (128, 3))),
    ),
    "down_backward": (
        *(Tile(16, n, k, 4, s) for n, k, s in ((64, 64, 3), (64, 128, 3), (128, 64, 3))),
        *(Tile(64, 64, 64, 4, s) for s in (4, 3)),
        *(Tile(128, n, k, 8, s) for n, k, s in ((64, 64, 4), (64, 64, 3), (128, 64, 3), (64, 32, 4))),
        *(Tile(128, 128, 64, 8, 3, max_registers=128, uses_descriptor=by) for by in (False, True)),
    ),
    "input_gradient": (
        *(Tile(16, n, k, 4, s) for n, k, s in ((64, 128, 4), (128, 64, 4), (64, 64, 5))),
        *(Tile(64, n, 64, w, s) for n, w, s in ((128, 4, 4), (64, 4, 4), (256, 8, 3))),
        *(Tile(128, n, k, 8, s) for n, k, s in ((256, 64, 3), (128, 64, 3), (128, 64, 4), (256, 32, 4))),
        *(Tile(128, n, 64, 8, s, uses_descriptor=True) for n, s in ((256, 3), (256, 4), (128, 3))),
    ),
    "weight_gradient": (
        *(Tile(64, n, k, 4, 2) for n, k in ((128, 16), (64, 32), (128, 32))),
        *(Tile(128, n, k, 8, s) for n, k, s in ((128, 64, 3), (128, 64, 5), (256, 64, 3), (256, 64, 5), (256, 64, 7))),
    ),
}
GROUPS = (1, 8, 32)
# A tile's result may differ from the safe one's by the order of its sums, and by rounding of what is rounded to bf16.
# Held block by block: over a whole tensor a wrong tile would not show.
_TOLERANCE = 1e-2


@dataclass
class _Inputs:
    """Random inputs of every kernel of one layer."""

    x: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    indices: Tensor
    weights: Tensor
    activated: Tensor
    preactivation: Tensor


def tune(
    *,
    num_tokens: int,
    num_slots: int,
    hidden: int,
    width: int,
    num_experts: int,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    candidates: dict[str, tuple[Tile, ...]] = CANDIDATES,
    groups: tuple[int, ...] = GROUPS,
    timer: Callable[[Callable[[], object]], float] = do_bench,
) -> Tiles:
    """Time the candidates, save the best for (GPU, H, I, rows per expert) and return them.

    Args:
        num_tokens: T; matters only through the rows per expert.
        num_slots: K.
        hidden: H.
        width: I.
        num_experts: E.
        dtype: Of the operands; two bytes wide, for wider ones are cut from the same entry.
        device: A GPU, or ``cpu`` in a process started with TRITON_INTERPRET=1.
        candidates: Tiles to try, by kernel.
        groups: Values of `group_m` to try with each kernel's best tile.
        timer: Runs a function and returns its milliseconds.

    Raises:
        ValueError: No candidate of some kernel runs, or the GPU's stream is being captured in a graph.
    """
    if device != "cpu" and torch.cuda.is_current_stream_capturing():
        raise ValueError("tune: a CUDA graph is being captured, expected a call outside of it")
    inputs = _make_inputs(num_tokens, num_slots, hidden, width, num_experts, dtype, device)
    with on_device_of(inputs.x):
        best = _search(inputs, num_slots, candidates, groups, timer)
    bucket = row_bucket(num_tokens * num_slots, num_experts)
    path = save_tuned(device_name(inputs.x.device), hidden, width, bucket, best)
    logger.info("fused_moe: tiles for H=%d, I=%d, bucket %d saved in %s", hidden, width, bucket, path)
    return best


def _search(
    inputs: _Inputs,
    num_slots: int,
    candidates: dict[str, tuple[Tile, ...]],
    groups: tuple[int, ...],
    timer: Callable[[Callable[[], object]], float],
) -> Tiles:
    heights = sorted({tile.block_m for name in ROW_KERNELS for tile in candidates[name]})
    per_height = []
    for height in heights:
        found = {
            name: _fastest(
                name, inputs, num_slots, [t for t in candidates[name] if t.block_m == height], groups, timer
            )
            for name in ROW_KERNELS
        }
        if None not in found.values():
            per_height.append((sum(ms for ms, _ in found.values()), {name: tile for name, (_, tile) in found.items()}))
    other = _fastest("weight_gradient", inputs, num_slots, candidates["weight_gradient"], groups, timer)
    if not per_height or other is None:
        raise ValueError(f"candidates: none of them runs on {device_name(inputs.x.device)}")
    return Tiles(**min(per_height, key=lambda entry: entry[0])[1], weight_gradient=other[1])


def _fastest(
    name: str,
    inputs: _Inputs,
    num_slots: int,
    tiles: Sequence[Tile],
    groups: tuple[int, ...],
    timer: Callable[[Callable[[], object]], float],
) -> tuple[float, Tile] | None:
    """Milliseconds and tile of the fastest candidate that runs and is right; None if there is none."""
    times = {}
    reference = _kernel(name, inputs, num_slots, getattr(SAFE, name))() if tiles else ()
    for tile in tiles:
        times[tile] = _time(name, inputs, num_slots, tile, reference, timer)
    if not times or min(times.values()) == float("inf"):
        return None
    best = min(times, key=times.get)
    for group in groups:
        tile = dataclasses.replace(best, group_m=group)
        if tile not in times:
            times[tile] = _time(name, inputs, num_slots, tile, reference, timer)
    best = min(times, key=times.get)
    return times[best], best


def _time(
    name: str,
    inputs: _Inputs,
    num_slots: int,
    tile: Tile,
    reference: tuple[Tensor, ...],
    timer: Callable[[Callable[[], object]], float],
) -> float:
    """Milliseconds; infinite for a tile that does not fit this GPU, does not compile for it, or is wrong."""
    try:
        run = _kernel(name, inputs, num_slots, tile)
        results = run()
        if not all(_agree(one, other) for one, other in zip(results, reference, strict=True)):
            logger.warning("fused_moe: %s with %s gives another result than the safe tiles; left out", name, tile)
            return float("inf")
        return timer(run)
    except (OutOfResources, PTXASError) as error:
        logger.info("fused_moe: %s with %s does not run here: %s", name, tile, error)
        return float("inf")


def _agree(one: Tensor, other: Tensor) -> bool:
    return largest_tile_error(one, other) <= _TOLERANCE


def _kernel(name: str, inputs: _Inputs, num_slots: int, tile: Tile) -> Callable[[], tuple[Tensor, ...]]:
    """The kernel as a function without arguments that returns its results."""
    metadata = routing_metadata(inputs.indices, inputs.down_proj.shape[0], tile.block_m)
    if name == "gate_up":
        return lambda: gate_up(inputs.x, inputs.gate_up_proj, metadata, num_slots, "silu", True, tile)
    if name == "down":
        return lambda: (grouped_gemm(inputs.activated, inputs.down_proj, metadata, tile, transpose=True),)
    if name == "input_gradient":
        return lambda: (grouped_gemm(inputs.preactivation, inputs.gate_up_proj, metadata, tile, transpose=False),)
    if name == "down_backward":
        return lambda: _down_backward(inputs, metadata, tile)
    return lambda: _both_weight_gradients(inputs, metadata, num_slots, tile)


def _down_backward(inputs: _Inputs, metadata: RoutingMetadata, tile: Tile) -> tuple[Tensor, ...]:
    operands = (inputs.x, inputs.down_proj, inputs.preactivation, inputs.weights)
    grad_h, scaled, partial = down_backward(*operands, metadata, "silu", tile)
    assert scaled is not None
    return grad_h, scaled, partial.sum(0)  # of as many parts as the tile makes


def _both_weight_gradients(
    inputs: _Inputs, metadata: RoutingMetadata, num_slots: int, tile: Tile
) -> tuple[Tensor, Tensor]:
    return (
        weight_gradient(inputs.x, inputs.activated, metadata, num_slots, tile, gather="left"),
        weight_gradient(inputs.preactivation, inputs.x, metadata, num_slots, tile, gather="right"),
    )


def _make_inputs(
    num_tokens: int, num_slots: int, hidden: int, width: int, num_experts: int, dtype: torch.dtype, device: str
) -> _Inputs:
    """Inputs of order one; every slot used, every expert with as many rows as the next, give or take one."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.float32).to(dtype)

    num_rows = num_tokens * num_slots
    order = torch.randperm(num_rows, generator=generator, device=device) % num_experts
    return _Inputs(
        normal(num_tokens, hidden),
        normal(num_experts, 2 * width, hidden) / hidden**0.5,
        normal(num_experts, hidden, width) / width**0.5,
        order.view(num_tokens, num_slots),
        torch.rand(num_tokens, num_slots, generator=generator, device=device),
        normal(num_rows, width),
        normal(num_rows, 2 * width),
    )
