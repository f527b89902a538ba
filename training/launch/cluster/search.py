"""The layout that trains fastest among those that fit."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from deepseek_training.launch.cluster.devices import Device
from deepseek_training.launch.cluster.layout import RECOMPUTE, Layout, check_layout
from deepseek_training.launch.cluster.memory import Memory, estimate_memory
from deepseek_training.launch.cluster.shape import ModelShape
from deepseek_training.launch.cluster.step_estimate import StepTime, estimate_step

# What the allocator, the communication library and CUDA itself keep from a training.
USABLE_SHARE = 0.88
# How far a batch that does not divide over the devices may move.
_BATCH_SHARE = 0.1


@dataclass(frozen=True)
class Candidate:
    """A layout with what it needs."""

    layout: Layout
    memory: Memory
    step: StepTime


def fits(memory: Memory, device: Device) -> bool:
    """Return whether a training fits a device."""
    return memory.total <= USABLE_SHARE * device.memory_bytes


def find_layouts(
    shape: ModelShape, device: Device, num_devices: int, asked: Layout, fixed: set[str]
) -> list[Candidate]:
    """Return the layouts that fit, the fastest first.

    Args:
        shape: The model's.
        device: The accelerator.
        num_devices: How many there are; a layout uses all, or as many as a whole number of its groups takes.
        asked: Gives batch, length, precision, and the values of `fixed`.
        fixed: Fields of `Layout` that are not searched.
    """
    found = []
    for layout in _layouts(shape, device, num_devices, asked, fixed):
        memory = estimate_memory(shape, layout)
        if fits(memory, device):
            found.append(Candidate(layout, memory, estimate_step(shape, layout, device)))
    # By the whole cluster's tokens: a layout that leaves devices idle pays for it.
    return sorted(found, key=lambda one: -one.step.tokens / one.step.seconds)


def _layouts(shape: ModelShape, device: Device, num_devices: int, asked: Layout, fixed: set[str]) -> Iterator[Layout]:
    def values(name: str, tried: list[Any]) -> list[Any]:
        return [getattr(asked, name)] if name in fixed else tried

    powers = [2**n for n in range(8)]
    for pipeline in values("pipeline", [n for n in powers if n <= min(32, len(shape.layers))]):
        for tensor in values("tensor", [n for n in powers if n <= device.node_size]):
            for expert in values("expert", [n for n in powers if shape.num_experts or n == 1]):
                sizes = {"pipeline": pipeline, "tensor": tensor, "expert": expert}
                data = asked.data if "data" in fixed else _data_size(num_devices, **sizes)
                for zero, recompute, virtual in itertools.product(
                    values("zero", [1] if pipeline > 1 else [1, 2, 3]),
                    values("recompute", list(RECOMPUTE)),
                    values("virtual", [1, 2, 4]),
                ):
                    chosen = {"zero": zero, "recompute": recompute, "virtual": virtual}
                    layout = _with_batch(replace(asked, data=data, **sizes, **chosen))
                    if layout is not None and layout.world <= num_devices and _is_valid(layout, shape):
                        yield layout


def _data_size(num_devices: int, *, pipeline: int, tensor: int, expert: int) -> int:
    """The most data-parallel devices over which the experts divide; 0 where there are too few."""
    data = num_devices // (pipeline * tensor)
    return data - data % (expert // math.gcd(expert, tensor))


def _with_batch(layout: Layout) -> Layout | None:
    """The layout with the nearest batch that its devices divide; None where that is too far away."""
    per_pass = layout.data * layout.micro_batch
    if per_pass < 1:
        return None
    batch = max(1, round(layout.batch / per_pass)) * per_pass
    return replace(layout, batch=batch) if abs(batch / layout.batch - 1) <= _BATCH_SHARE else None


def _is_valid(layout: Layout, shape: ModelShape) -> bool:
    try:
        check_layout(layout, shape)
    except ValueError:
        return False
    return True
