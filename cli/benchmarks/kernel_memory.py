"""How much memory one step of an experts implementation takes; ``benchmarks/kernels.py`` asks.

Surprising: a CPU allocator keeps no count of what it handed out, so there the peak is what the process grew by: Linux
resets and reports the largest resident size of a process. What the step before left in pools is given back first, or
an implementation that uses buffers again would seem to need none.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from deepseek_kernels.cpu import large_buffers

_RESET_PEAK = "5"  # proc(5), /proc/pid/clear_refs


def kept_bytes(forward: Callable[[], Tensor], module: nn.Module) -> int:
    """Return the bytes that stay from the forward to the backward pass, parameters left out.

    Args:
        forward: Runs a forward pass with gradients.
        module: Whose parameters do not count.
    """
    own = {parameter.data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = max(kept.get(storage.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()  # held until the count is done, or addresses would be used twice
    total = sum(kept.values())
    del output
    return total


def peak_memory(step: Callable[[], object], device: str) -> int | None:
    """Return the most bytes taken by a step beyond what was there before; None where that is not counted.

    Args:
        step: Runs once.
        device: ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    large_buffers.release_idle()
    _trim_heap()
    try:
        Path("/proc/self/clear_refs").write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
    except OSError:  # not Linux, or not allowed
        return None
    step()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status: no {name}")


def _trim_heap() -> None:
    """Give free heap pages back to the system, by glibc; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
