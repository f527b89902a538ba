"""How often a large run breaks, what that costs, and how often to save: formula and simulation.

Young (1974) and Daly (2006, Future Generation Computer Systems 22, equation 37) give the interval that loses least;
`simulate` plays devices that fail independently and counts what is lost.
"""

import math
from dataclasses import dataclass

import numpy as np

# 419 unexpected interruptions of 16,384 H100 in 54 days (Llama 3, arXiv 2407.21783, section 3.3.4).
DEVICE_HOURS_PER_FAILURE = 54 * 24 * 16384 / 419


@dataclass(frozen=True)
class Checkpointing:
    """What a checkpoint costs.

    Attributes:
        size_bytes: Of all devices together.
        pause_s: Seconds that training stands still for one: the copy to host memory where it is written beside
            training, else the whole write.
        write_s: Seconds until it is on disk; the shortest interval there can be.
        restart_s: Seconds from a failure until training goes on: notice, replace, start, load.
    """

    size_bytes: float
    pause_s: float
    write_s: float
    restart_s: float


def estimate_checkpoint(
    num_parameters: float,
    num_devices: int,
    *,
    moment_bytes: int,
    storage_bytes_per_second: float,
    restart_s: float,
    copy_bytes_per_second: float = 20e9,
) -> Checkpointing:
    """Return the cost of a checkpoint written beside training.

    Args:
        num_parameters: Of the model.
        num_devices: Devices that write their share.
        moment_bytes: Bytes of one of AdamW's moments.
        storage_bytes_per_second: Of the whole storage.
        restart_s: Notice, replace and start; loading comes on top.
        copy_bytes_per_second: From one device to host memory.
    """
    size = num_parameters * (4 + 2 * moment_bytes)
    write = size / storage_bytes_per_second
    return Checkpointing(size, size / num_devices / copy_bytes_per_second, write, restart_s + write)


def mean_hours_between_failures(num_devices: int, device_hours: float = DEVICE_HOURS_PER_FAILURE) -> float:
    """Return the mean hours between failures of any of so many devices.

    Args:
        num_devices: Devices, each failing independently.
        device_hours: Mean hours of one device.
    """
    return device_hours / num_devices


def best_interval_s(pause_s: float, failure_s: float) -> float:
    """Return Daly's interval of useful work between two checkpoints, in seconds.

    Args:
        pause_s: What one checkpoint costs.
        failure_s: Mean seconds between failures.
    """
    if pause_s >= 2 * failure_s:
        return failure_s
    ratio = pause_s / (2 * failure_s)
    return math.sqrt(2 * pause_s * failure_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - pause_s


def expected_goodput(interval_s: float, cost: Checkpointing, failure_s: float) -> float:
    """Return the share of wall time that ends up as kept work (Daly 2006, equation 20).

    Args:
        interval_s: Useful work between two checkpoints.
        cost: Of a checkpoint and a restart.
        failure_s: Mean seconds between failures.
    """
    spent = failure_s * math.exp(cost.restart_s / failure_s) * math.expm1((interval_s + cost.pause_s) / failure_s)
    return interval_s / spent


def simulate(
    work_s: float,
    interval_s: float,
    cost: Checkpointing,
    *,
    num_devices: int,
    device_s: float,
    seed: int = 0,
    limit: float = 100.0,
) -> float:
    """Return the goodput of one simulated run: useful seconds over all seconds.

    Each device draws its own time to failure from an exponential distribution and a new one when it is replaced. A
    failure loses the work since the last checkpoint; one during a restart begins the restart anew.

    Args:
        work_s: Useful seconds that the run needs.
        interval_s: Useful work between two checkpoints.
        cost: Of a checkpoint and a restart.
        num_devices: Devices.
        device_s: Mean seconds to a device's failure.
        seed: Of the draws.
        limit: Give up after so many times the work, and return what was reached.
    """
    random = np.random.default_rng(seed)
    fails_at = random.exponential(device_s, num_devices)
    now = done = 0.0
    while done < work_s and now < limit * work_s:
        next_failure = float(fails_at.min())
        step = min(interval_s, work_s - done)
        if now + step + cost.pause_s <= next_failure:
            # Whole intervals up to the failure at once.
            count = 1 if step < interval_s else int((next_failure - now) / (interval_s + cost.pause_s))
            count = max(1, min(count, int((work_s - done) / interval_s) or 1))
            now, done = now + count * (step + cost.pause_s), done + count * step
            continue
        now = next_failure
        fails_at[fails_at.argmin()] = now + random.exponential(device_s)
        ready = now + cost.restart_s
        while (again := float(fails_at.min())) < ready:
            fails_at[fails_at.argmin()] = again + random.exponential(device_s)
            ready = again + cost.restart_s
        now = ready
    return done / now
