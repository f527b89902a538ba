"""How much energy a run used, where the machine has a meter, and how much processor time in any case.

Two meters are read: RAPL, which counts what the processor's packages and memory draw (`/sys/class/powercap`, on most
machines for root only), and NVML, which counts what an NVIDIA GPU draws. Both count the whole device, whatever else
works on it. Where neither can be read no energy is told: estimates are not made here, and are left to whoever writes
about the run. `RunFolder.create` starts a meter, `RunFolder.finish` writes what it counted into the summary.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
# RAPL's counters run over after a quarter of an hour at full load.
_POLL_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Energy:
    """What a run's meter counted.

    Args:
        joules: By device, such as ``RAPL package-0`` or ``NVML 0: NVIDIA H100``; empty where no meter could be read.
        cpu_seconds: Processor time of the process and of those that it started and waited for.
        seconds: Between the first reading and the last.
        num_processes: Of the training; `cpu_seconds` is of one of them.
        num_machines: That these ran on; `joules` is of one of them.
        is_whole: False where the run was begun by another process before, whose part is not counted.
    """

    joules: Mapping[str, float] = field(default_factory=dict)
    cpu_seconds: float
    seconds: float
    num_processes: int = 1
    num_machines: int = 1
    is_whole: bool = True


class EnergyMeter:
    """Counts from now on.

    Args:
        powercap: Where the system shows RAPL's counters; None: where Linux does.
    """

    def __init__(self, powercap: Path | None = None) -> None:
        self._zones = _find_zones(powercap or POWERCAP)
        self._last = {name: _read(zone / "energy_uj") for name, zone in self._zones.items()}
        self._microjoules = dict.fromkeys(self._zones, 0)
        self._gpus = _Gpus.find()
        self._gpus_before = self._gpus.read()
        self._began, self._cpu_before = time.monotonic(), _cpu_seconds()
        self._lock, self._stop = threading.Lock(), threading.Event()
        if self._zones:
            threading.Thread(target=self._poll, name="energy", daemon=True).start()

    def _poll(self) -> None:
        while not self._stop.wait(_POLL_SECONDS):
            self.read_zones()

    def read_zones(self) -> None:
        """Add what RAPL has counted since the last reading; a counter that ran over once in between is understood."""
        with self._lock:
            for name, zone in self._zones.items():
                now = _read(zone / "energy_uj")
                passed = now - self._last[name]
                self._microjoules[name] += passed if passed >= 0 else passed + _read(zone / "max_energy_range_uj")
                self._last[name] = now

    def stop(self, *, is_whole: bool = True) -> Energy:
        """Return what was counted, and count no more.

        Args:
            is_whole: As in `Energy`.
        """
        self._stop.set()
        self.read_zones()
        joules = {f"RAPL {name}": value / 1e6 for name, value in self._microjoules.items()}
        for name, value in self._gpus.read().items():
            joules[f"NVML {name}"] = (value - self._gpus_before[name]) / 1e3
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        return Energy(
            joules=joules,
            cpu_seconds=round(_cpu_seconds() - self._cpu_before, 2),
            seconds=round(time.monotonic() - self._began, 2),
            num_processes=num_processes,
            num_machines=max(1, num_processes // int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))),
            is_whole=is_whole,
        )


def _cpu_seconds() -> float:
    return sum(os.times()[:4])


def _find_zones(powercap: Path) -> dict[str, Path]:
    """RAPL's packages and memories that can be read, by name; cores are a part of their package."""
    found = {}
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text(encoding="ascii").strip()
            _read(zone / "energy_uj")
            _read(zone / "max_energy_range_uj")
        except (OSError, ValueError):  # for root only, or a zone without a counter
            continue
        if name.startswith("package"):
            found[name] = zone
        elif name == "dram":
            found[f"{name}-{zone.name.split(':')[1]}"] = zone
    return found


def _read(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


@dataclass(frozen=True)
class _Gpus:
    """The GPUs that torch sees, as NVML knows them."""

    nvml: ctypes.CDLL | None = None
    handles: Mapping[str, ctypes.c_void_p] = field(default_factory=dict)

    @classmethod
    def find(cls) -> "_Gpus":
        """None where torch is not imported, sees no NVIDIA GPU, or NVML does not count."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_available() or torch.version.cuda is None:
            return cls()
        parts = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return cls.of({f"{number}: {part.name}": str(part.uuid) for number, part in enumerate(parts)})

    @classmethod
    def of(cls, uuids: Mapping[str, str], library: str = "libnvidia-ml.so.1") -> "_Gpus":
        """Find GPUs by what the driver calls them."""
        try:
            nvml = ctypes.CDLL(library)
        except OSError:
            return cls()
        if nvml.nvmlInit_v2() != 0:
            return cls()
        handles = {}
        for name, uuid in uuids.items():
            handle = ctypes.c_void_p()
            full = uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
            if nvml.nvmlDeviceGetHandleByUUID(full.encode(), ctypes.byref(handle)) == 0:
                handles[name] = handle
        gpus = cls(nvml, handles)
        counted = gpus.read()
        return cls(nvml, {name: handle for name, handle in handles.items() if name in counted})

    def read(self) -> dict[str, int]:
        """Millijoules since the driver was loaded, by GPU."""
        found = {}
        for name, handle in self.handles.items():
            count = ctypes.c_ulonglong()
            assert self.nvml is not None
            if self.nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count)) == 0:
                found[name] = count.value
        return found
