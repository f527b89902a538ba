"""How much of the memory that a process may use is used: of the machine, of a container, of a limit, of each GPU."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

# Limit, used and, of that, file pages that can be dropped: of version 2 and version 1, as a container sees its own.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


@dataclass(frozen=True)
class Memory:
    """One kind of memory.

    Attributes:
        kind: `machine`, `container`, `process` (its data against RLIMIT_DATA) or `device0` and on.
        used_bytes: In use.
        limit_bytes: What there is.
    """

    kind: str
    used_bytes: int
    limit_bytes: int


def read_memory() -> list[Memory]:
    """Return every kind that has a limit here; where there is no /proc, of GPUs only."""
    found = []
    if Path("/proc/meminfo").exists():
        machine = _read_machine()
        found = [machine, *_read_container(machine.limit_bytes), *_read_process()]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            found.append(Memory(f"device{number}", total - free, total))
    return found


def _read_machine() -> Memory:
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return Memory("machine", sizes["MemTotal"] - sizes["MemAvailable"], sizes["MemTotal"])


def _read_container(machine_bytes: int) -> list[Memory]:
    for limit, used, dropped in _CONTROL_GROUPS:
        if Path(limit).exists() and Path(used).exists():
            text = Path(limit).read_text().strip()
            if text == "max" or int(text) >= machine_bytes:  # version 1 writes a huge number for "no limit"
                return []
            lines = Path(used).with_name("memory.stat").read_text().splitlines()
            free = next((int(line.split()[1]) for line in lines if line.split()[0] == dropped), 0)
            return [Memory("container", int(Path(used).read_text()) - free, int(text))]
    return []


def _read_process() -> list[Memory]:
    most, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY:
        return []
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    return [Memory("process", pages * os.sysconf("SC_PAGE_SIZE"), most)]
