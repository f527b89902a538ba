"""Energy by the system's own files and NVML's own calls, counters that run over, and what is not there."""

import json
import shutil
import subprocess

import pytest
import torch

from deepseek_records import energy
from deepseek_records.energy import Energy, EnergyMeter
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary


def zone(root, folder, name, count, most=1_000_000):
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    for file, value in (("name", name), ("energy_uj", count), ("max_energy_range_uj", most)):
        (path / file).write_text(f"{value}\n")
    return path / "energy_uj"


@pytest.fixture
def powercap(tmp_path):
    root = tmp_path / "powercap"
    zone(root, "intel-rapl:0", "package-0", 100)
    zone(root, "intel-rapl:0:0", "core", 50)
    zone(root, "intel-rapl:0:1", "dram", 10)
    zone(root, "intel-rapl:1", "psys", 7)
    return root


def test_packages_and_memory_are_counted_once(powercap):
    meter = EnergyMeter(powercap)
    zone(powercap, "intel-rapl:0", "package-0", 600_100)
    zone(powercap, "intel-rapl:0:0", "core", 500_050)
    zone(powercap, "intel-rapl:0:1", "dram", 20_010)
    found = meter.stop()
    assert found.joules == {"RAPL package-0": pytest.approx(0.6), "RAPL dram-0": pytest.approx(0.02)}
    assert found.is_whole and found.cpu_seconds >= 0


def test_a_counter_that_runs_over_is_read_in_between(powercap):
    meter = EnergyMeter(powercap)
    for count in (900_000, 200_000, 100_000):  # 0.8999 J, then 0.3 past the end of the range, then 0.9
        zone(powercap, "intel-rapl:0", "package-0", count)
        meter.read_zones()
    assert meter.stop().joules["RAPL package-0"] == pytest.approx(0.8999 + 0.3 + 0.9)


def test_without_a_meter_no_energy_is_told(tmp_path):
    found = EnergyMeter(tmp_path / "nowhere").stop()
    assert found.joules == {} or all(name.startswith("NVML") for name in found.joules)
    (tmp_path / "rapl" / "intel-rapl:0").mkdir(parents=True)  # a zone that holds nothing to read
    assert not [name for name in EnergyMeter(tmp_path / "rapl").stop().joules if name.startswith("RAPL")]


def test_a_run_keeps_what_it_used(powercap, tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "POWERCAP", powercap)
    run = RunFolder.create(tmp_path / "run", {"a": 1}, command="pretrain")
    (run.path / "metrics.jsonl").write_text("")
    resumed = RunFolder.create(tmp_path / "run", {"a": 1}, command="pretrain")
    zone(powercap, "intel-rapl:0", "package-0", 500_100)
    torch.randn(400, 400).mm(torch.randn(400, 400))
    resumed.finish(Summary(stage="pretrain"))
    told = json.loads((run.path / "summary.json").read_text())["energy"]
    assert told["joules"]["RAPL package-0"] == pytest.approx(0.5) and told["is_whole"] is False
    assert RunFolder(run.path).summary.energy == Energy(**told)


# NVML's four calls, as its header declares them; the counter rises by 1,500 mJ with each reading.
NVML = """
static unsigned long long count = 1000;
int nvmlInit_v2(void) { return 0; }
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    for (int i = 0; i < 4; i++) if (uuid[i] != "GPU-"[i]) return 2;
    if (uuid[4] == 'x') return 6;
    *device = (void *) 0x7fff12345678; return 0;
}
int nvmlDeviceGetTotalEnergyConsumption(void *device, unsigned long long *energy) {
    if (device != (void *) 0x7fff12345678) return 3;
    *energy = count; count += 1500; return 0;
}
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler")
def test_nvml_is_called_as_its_header_says(tmp_path):
    (tmp_path / "nvml.c").write_text(NVML)
    library = tmp_path / "libnvml.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "nvml.c"], check=True)
    gpus = energy._Gpus.of({"0: A": "a-1", "1: B": "x-2", "2: C": "GPU-c"}, str(library))
    first, second = gpus.read(), gpus.read()
    assert list(first) == ["0: A", "2: C"]
    assert second["0: A"] - first["0: A"] == 3000
    assert energy._Gpus.of({"0: A": "a-1"}, str(tmp_path / "absent.so")).read() == {}


@pytest.mark.gpu
def test_a_gpu_at_work_draws_energy():
    meter = EnergyMeter()
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(400):
        a = (a @ a).clamp(-1, 1)
    torch.cuda.synchronize()
    joules = [value for name, value in meter.stop().joules.items() if name.startswith("NVML")]
    assert joules and all(1 < value < 100_000 for value in joules)
