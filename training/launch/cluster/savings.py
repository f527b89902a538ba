"""What a layout would hold with less kept, or kept elsewhere: the table beside a plan's memory.

A row per way, each counted as the plan's own memory is: every activation computed again, AdamW's moments in 8 bits
(bitsandbytes' and torchao's, a scale per 256 values), the optimizer in the host's memory (DeepSpeed's
`offload_optimizer`).
"""

import dataclasses
from dataclasses import dataclass

from deepseek_training.launch.cluster.layout import Layout
from deepseek_training.launch.cluster.memory import Memory, estimate_memory
from deepseek_training.launch.cluster.shape import ModelShape


@dataclass(frozen=True)
class Saving:
    """One way.

    Attributes:
        way: Its name.
        memory: Of the fullest device.
        host_bytes: What lies in the host's memory instead, per device.
    """

    way: str
    memory: Memory
    host_bytes: float = 0.0


def find_savings(shape: ModelShape, layout: Layout) -> list[Saving]:
    """Return the ways that this layout does not take yet, and the last, all of them together.

    Args:
        shape: The model's.
        layout: One that `check_layout` accepts.
    """
    small = dataclasses.replace(layout, recompute="full", moment_bytes=1)
    found = []
    if layout.recompute != "full":
        again = dataclasses.replace(layout, recompute="full")
        found.append(Saving("recompute full", estimate_memory(shape, again)))
    if layout.moment_bytes > 1:
        short = dataclasses.replace(layout, moment_bytes=1)
        found.append(Saving("8-bit moments", estimate_memory(shape, short)))
    found.append(_offloaded("optimizer on the CPU", estimate_memory(shape, layout)))
    if len(found) > 1:
        found.append(_offloaded("all of these", estimate_memory(shape, small)))
    return found


def _offloaded(way: str, memory: Memory) -> Saving:
    return Saving(way, dataclasses.replace(memory, optimizer=0.0), memory.optimizer)
