"""The clock of ``deepseek-moe bench kernels``: steps in turn, their parts apart, the median of each.

``benchmarks/kernels.py`` calls `interleave`, and `OtherWork` to say whether the machine was quiet. Surprising: a step
marks its own parts, because the backward pass cannot be repeated without its forward pass; on a GPU the marks are
events of the stream, so that nothing waits in between.
"""

import itertools
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Mark = Callable[[], None]
_MAX_ROUNDS = 200
_FEWEST = 3
_ALLOWANCES = 2
# Shorter steps wait for the host on a GPU, and the host for caches that others have filled.
_SHORT_MS = 10.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one part of a step.

    Attributes:
        ms: The median.
        stderr: Its standard error, from the spread of the rounds; 0 for one round.
        num_rounds: How often it ran.
    """

    ms: float
    stderr: float
    num_rounds: int


def interleave(
    steps: dict[str, Callable[[Mark], object]],
    seconds: float,
    device: str,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Timing]]:
    """Return, for each step, the milliseconds of each of its parts, and of the whole as the last.

    Every round has an order of its own: in a fixed one, the step after ``batched_mm`` with its copies always finds a
    cold cache (0.87 instead of 0.95 of the best at one token in bf16). A step that has taken twice its time is not run
    again. On a GPU a step of under 10 ms runs twice and the second is timed, launched while the first runs: as in a
    program's own loop, the host is ahead and finds its code and the allocator's blocks as the step before left them.

    Args:
        steps: Each calls the mark it is given at the beginning and at the end of every part.
        seconds: How long to go on, about.
        device: ``cpu`` or ``cuda``.
        clock: Seconds on a CPU.
    """
    samples: dict[str, list[list[float]]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    short: set[str] = set()
    order = random.Random(0)
    begun = time.perf_counter()

    def is_done(name: str) -> bool:
        return len(samples[name]) >= _FEWEST or spent[name] > _ALLOWANCES * seconds

    while True:
        waiting = [name for name in steps if not is_done(name) or spent[name] <= seconds / 2]
        if not waiting:
            break
        for name in order.sample(waiting, len(waiting)):
            times = _time(steps[name], device, clock, is_second=name in short)
            spent[name] += sum(times) / 1e3
            if device == "cuda" and name not in short and times[-1] < _SHORT_MS:
                short.add(name)
                samples[name].clear()
            else:
                samples[name].append(times)
        if max(map(len, samples.values())) >= _MAX_ROUNDS:
            break
        if all(map(is_done, steps)) and time.perf_counter() - begun > seconds:
            break
    return {name: [_summarize(part) for part in zip(*rows, strict=True)] for name, rows in samples.items()}


def _summarize(samples: Sequence[float]) -> Timing:
    """Median and its standard error; of a normal distribution that is 1.2533 times the mean's."""
    count = len(samples)
    spread = statistics.stdev(samples) if count > 1 else 0.0
    return Timing(statistics.median(samples), 1.2533 * spread / count**0.5, count)


class OtherWork:
    """How many cores other processes keep busy from now on; on Linux, from the kernel's own accounts."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._before = _busy_seconds()

    def cores(self) -> float | None:
        """Return the mean since the beginning; None where nobody counts."""
        after = _busy_seconds()
        if self._before is None or after is None:
            return None
        return max(0.0, after - self._before) / (time.perf_counter() - self._begun)


def _busy_seconds() -> float | None:
    """CPU time that all processes but this one and its children have used, or another machine on the same cores."""
    try:
        with open("/proc/stat", encoding="utf-8") as file:
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    own = os.times()
    everybody = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return everybody - own.user - own.system - own.children_user - own.children_system


def synchronize(device: str) -> None:
    """Wait for a GPU; a CPU is done when it returns.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    if device == "cuda":
        torch.cuda.synchronize()


def _time(
    step: Callable[[Mark], object], device: str, clock: Callable[[], float], *, is_second: bool = False
) -> list[float]:
    """Milliseconds of each part of one run, or of the second of two, and of the whole."""
    marks: list[Any] = []
    if device == "cuda":

        def mark() -> None:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

    else:

        def mark() -> None:
            marks.append(clock())

    synchronize(device)
    if is_second:
        step(mark)
        marks.clear()
    step(mark)
    synchronize(device)
    pairs = list(itertools.pairwise(marks))
    if device == "cuda":
        parts = [start.elapsed_time(end) for start, end in pairs]
    else:
        parts = [1e3 * (end - start) for start, end in pairs]
    return [*parts, sum(parts)]
