"""`deepseek-moe bench kernels` on its smallest grid, really run, and the arithmetic of its speed-ups."""

import argparse
import csv
import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from deepseek_cli.benchmarks import kernel_table, kernels
from deepseek_cli.benchmarks.kernel_cells import Cell
from deepseek_cli.benchmarks.kernel_peers import find_implementations


def parse(*arguments):
    parser = argparse.ArgumentParser()
    kernel_table.add_arguments(parser)
    return parser.parse_args(arguments)


def test_quick_grid_measures_prints_and_saves(tmp_path, capsys):
    assert kernel_table.run(parse("--grid", "quick", "--seconds", "0.05", "--output", str(tmp_path / "run"))) == 0
    printed = capsys.readouterr().out
    assert "geometric mean of fused_moe" in printed and "grouped_mm" in printed
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    measured = {row["implementation"] for row in saved["rows"] if "ms" in row}
    assert {"fused_moe", "eager", "grouped_mm", "batched_mm", "torch_grouped_mm"} <= measured
    kept = {
        row["implementation"]: row["kept_bytes_per_token"]
        for row in saved["rows"]
        if row["mode"] == "forward+backward" and row["T"] == 64 and row["routing"] == "balanced" and "ms" in row
    }
    assert kept["fused_moe"] < kept["grouped_mm"]
    assert all((row["peak_memory_bytes"] or 0) >= 0 for row in saved["rows"] if "ms" in row)
    times = {row["mode"]: row["ms"] for row in saved["rows"] if row["implementation"] == "eager" and row["T"] == 1}
    assert 0 < times["backward"] < times["forward+backward"]
    assert {entry["mode"] for entry in saved["speedups"]} == {"forward", "backward", "forward+backward"}
    with open(tmp_path / "run" / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == len(saved["rows"])
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "run" / "plots" / "speedup.png").stat().st_size > 1000
    with pytest.raises(FileExistsError):
        kernel_table.run(parse("--grid", "quick", "--seconds", "0.05", "--output", str(tmp_path / "run")))


def test_speedup_is_over_the_best_other():
    row = {"T": 1, "H": 2, "I": 3, "E": 4, "K": 1, "routing": "balanced", "dtype": "float32", "mode": "forward"}
    times = {"fused_moe": 2.0, "eager": 8.0, "grouped_mm": 3.0}
    rows = [{**row, "implementation": name, "ms": ms} for name, ms in times.items()]
    rows.append({**row, "implementation": "sonicmoe", "skipped": "no GPU"})
    (entry,) = kernel_table.compute_speedups(rows)
    assert entry["best_other"] == "grouped_mm" and entry["speedup"] == 1.5 and entry["speedup_stderr"] == 0
    (entry,) = kernel_table.compute_speedups([{**row, "ms_stderr": 0.03 * row["ms"]} for row in rows if "ms" in row])
    assert entry["speedup_stderr"] == pytest.approx(1.5 * 0.03 * 2**0.5)
    assert kernel_table.compute_speedups(rows[:1]) == [] and kernel_table.compute_speedups(rows[1:]) == []


def test_fp8_of_our_own_is_no_other():
    row = {"T": 1, "H": 2, "I": 3, "E": 4, "K": 1, "routing": "balanced", "dtype": "bfloat16", "mode": "forward"}
    times = {"fused_moe": 2.0, "fused_moe_fp8": 1.0, "grouped_mm": 3.0}
    (entry,) = kernel_table.compute_speedups([{**row, "implementation": name, "ms": ms} for name, ms in times.items()])
    assert entry["best_other"] == "grouped_mm" and entry["speedup"] == 1.5


@pytest.mark.parametrize("is_training", [False, True])
def test_fp8_is_held_to_its_own_rounding(is_training):
    layer = kernels._Layer(Cell(64, 256, 128, 4, 2, dtype="bfloat16"), "cpu")
    implementation = find_implementations()[0]["fused_moe_fp8"]
    got = layer.make_step("fused_moe_fp8", implementation, is_training)(lambda: None)
    wanted = layer.reference(is_training)
    allowed = kernels.tolerance_of("fused_moe_fp8", torch.bfloat16)
    assert kernels._difference(got, wanted, allowed) is None
    assert "output by" in kernels._difference(got, wanted, kernels.tolerance_of("fused_moe", torch.bfloat16))
    got[0][:, 128:] *= 1.2  # a scale that is off
    assert "output by" in kernels._difference(got, wanted, allowed)


def test_a_gpu_grid_without_a_gpu_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="grid: got gpu, expected cpu or quick"):
        kernel_table.run(parse("--grid", "gpu", "--output", str(tmp_path)))


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9"])
def test_a_time_out_of_range_is_one_line(seconds, tmp_path):
    with pytest.raises(ValueError, match=r"seconds: got .*, expected more than 0 and at most 3600"):
        kernel_table.run(parse("--seconds", seconds, "--output", str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_an_interrupted_run_keeps_its_cells_and_is_taken_up(tmp_path, monkeypatch, capsys):
    from deepseek_cli.benchmarks import kernel_cells
    from deepseek_cli.benchmarks import kernels as kernel_benchmark

    measured = []
    original = kernel_benchmark.measure_cell

    def interrupted(cell, *rest):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(cell)
        return original(cell, *rest)

    command = parse("--grid", "quick", "--seconds", "0.02", "--output", str(tmp_path / "run"))
    monkeypatch.setattr(kernel_benchmark, "measure_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kernel_table.run(command)
    kept = json.loads((tmp_path / "run" / "results.json").read_text())["rows"]
    assert {row["T"] for row in kept} == {64} and not (tmp_path / "run" / "summary.json").exists()

    def rest(cell, *others):
        measured.append(cell)
        return original(cell, *others)

    monkeypatch.setattr(kernel_benchmark, "measure_cell", rest)
    assert kernel_table.run(command) == 0
    assert measured == kernel_cells.QUICK_GRID
    assert json.loads((tmp_path / "run" / "results.json").read_text())["rows"][: len(kept)] == kept


@pytest.mark.parametrize("text", ['{"rows": [', "[]", '{"rows": 3}', '{"rows": [7]}'])
def test_broken_results_of_an_interrupted_run_are_named(tmp_path, monkeypatch, text):
    from deepseek_cli.benchmarks import kernels as kernel_benchmark

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(kernel_benchmark, "measure_cell", interrupted)
    command = parse("--grid", "quick", "--output", str(tmp_path / "run"))
    with pytest.raises(KeyboardInterrupt):
        kernel_table.run(command)
    (tmp_path / "run" / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"^output: .*results.json"):
        kernel_table.run(command)


def test_a_failing_fused_moe_is_no_measurement(tmp_path, monkeypatch, capsys):
    from deepseek_cli.benchmarks import kernel_peers

    present, absent = kernel_peers.find_implementations()

    def failing(*arguments):
        raise ZeroDivisionError("by design")

    found = {"eager": present["eager"], "fused_moe": failing}, absent
    monkeypatch.setattr(kernel_peers, "find_implementations", lambda: found)
    assert kernel_table.run(parse("--grid", "quick", "--seconds", "0.02", "--output", str(tmp_path / "run"))) == 1
    assert "fused_moe failed in 6 rows, first: ZeroDivisionError: by design" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()
    monkeypatch.setattr(kernel_peers, "find_implementations", lambda: (present, absent))  # mended
    assert kernel_table.run(parse("--grid", "quick", "--seconds", "0.02", "--output", str(tmp_path / "run"))) == 0


def test_tuning_asks_once_for_each_size_and_rows_per_expert(monkeypatch, capsys):
    from deepseek_cli.benchmarks.kernel_cells import Cell
    from deepseek_kernels.gpu import tune

    asked = []
    monkeypatch.setattr(tune, "tune", lambda **shape: asked.append(shape))
    grid = [Cell(T, 64, 32, 8, 2, dtype="bfloat16") for T in (4, 8, 4096)] + [Cell(4, 64, 48, 8, 2, dtype="bfloat16")]
    kernel_table._tune(grid)
    assert [(shape["num_tokens"], shape["width"]) for shape in asked] == [(4, 48), (4096, 32), (4, 32)]
    assert "tuning H=64 I=48, as for T=4 E=8 K=2" in capsys.readouterr().out


def test_without_matplotlib_there_is_no_chart_and_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    kernel_table._draw(tmp_path / "plots" / "speedup.png", [], {})
    assert "no chart: matplotlib is not installed" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts by /proc/stat")
def test_work_of_other_processes_is_noticed():
    from deepseek_cli.benchmarks.kernel_timing import OtherWork

    counted = OtherWork()
    subprocess.run([sys.executable, "-c", "import time; t = time.time()\nwhile time.time() < t + 1: pass"], check=True)
    assert counted.cores() > 0.4
    row = {"T": 1, "device": "cpu", "mode": "forward", "implementation": "eager", "ms": 1.0, "tflops": 1.0}
    row |= {"share_of_matmul_peak": 0.5, "kept_bytes_per_token": None, "peak_memory_bytes": None}
    assert "kept 0.9 cores busy" in kernel_table._format_rows("", [{**row, "other_work_cores": 0.9}], set())
    assert "busy" not in kernel_table._format_rows("", [{**row, "other_work_cores": 0.1}], set())


def test_a_short_step_on_a_gpu_is_timed_right_behind_another(monkeypatch):
    """Once it has shown to be short; a first time that compiled something does not count."""
    from deepseek_cli.benchmarks import kernel_timing

    first = {"short": 50.0, "long": 40.0}
    calls = []

    def time_of(name, device, clock, *, is_second):
        calls.append((name, is_second))
        return [first.pop(name, 5.0 if name == "short" else 20.0)] * 2

    monkeypatch.setattr(kernel_timing, "_time", time_of)
    timings = kernel_timing.interleave({"short": "short", "long": "long"}, 0.3, "cuda")
    assert [is_second for name, is_second in calls if name == "short"][:3] == [False, False, True]
    assert not any(is_second for name, is_second in calls if name == "long")
    assert timings["short"][-1].ms == 5 and timings["short"][-1].stderr == 0
    assert timings["long"][-1].ms == 20 and timings["long"][-1].num_rounds >= 3


def test_eager_is_left_out_of_many_tokens_on_a_gpu():
    from deepseek_cli.benchmarks.kernels import _reason_to_skip

    for num_tokens, device, is_left_out in ((1024, "cuda", True), (16, "cuda", False), (1024, "cpu", False)):
        cell = Cell(num_tokens, 64, 48, 8, 2)
        assert (_reason_to_skip(cell, "eager", torch.float32, device) is not None) == is_left_out
        assert _reason_to_skip(cell, "grouped_mm", torch.float32, device) is None
