"""Large CPU buffers that are taken up again instead of being given back to the system.

``cpu/experts.py`` takes the pre-activation and the weight gradients from here. A fresh buffer costs one page fault
every 4 KiB when first written: 113 ms for 268 MB, where writing it a second time costs 10 ms (one core of AMD EPYC
9004, 2026-11). Training asks for the same sizes every step, so buffers whose tensors died are kept for the next one.

Nothing has to be given back by hand. The tensor holds the buffer; when its storage dies, the buffer falls
back into the pool, or to the system once the pool holds `MAX_IDLE_BYTES`.
"""

import math
import mmap
import threading
import weakref

import torch
from torch import Tensor

MIN_BYTES = 2**20
MAX_IDLE_BYTES = 2 * 2**30
PAGE_BYTES = 2 * 2**20

_idle: dict[int, list[mmap.mmap]] = {}
_lock = threading.RLock()


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Return an uninitialized CPU tensor, from the pool where it is large.

    Args:
        shape: Sizes.
        dtype: Element type.
    """
    count = math.prod(shape)
    num_bytes = count * dtype.itemsize
    if num_bytes < MIN_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype)
    size = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
    with _lock:
        waiting = _idle.get(size)
        pages = waiting.pop() if waiting else _new_pages(size)
    view = memoryview(pages)
    weakref.finalize(view, _take_back, size, pages).atexit = False
    return torch.frombuffer(view, dtype=dtype, count=count).view(shape)


def idle_bytes() -> int:
    """Return how much the pool holds for later."""
    with _lock:
        return sum(size * len(waiting) for size, waiting in _idle.items())


def release_idle() -> None:
    """Give everything the pool holds back to the system."""
    with _lock:
        _idle.clear()


def _new_pages(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _take_back(size: int, pages: mmap.mmap) -> None:
    with _lock:
        if idle_bytes() + size <= MAX_IDLE_BYTES:
            _idle.setdefault(size, []).append(pages)
