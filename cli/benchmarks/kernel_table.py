"""``deepseek-moe bench kernels``: side-by-side tables of the kernels, printed and saved.

Called by `deepseek_cli.bench`; light to import, as the options are declared here. Writes ``results.json``,
``results.csv`` and ``plots/speedup.png`` into a run folder. The mean is over ``forward`` and ``forward+backward``;
``backward`` by itself is shown and left out of it, being part of the latter.
"""

import argparse
import csv
import io
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HELP = "Time the fused MoE layer against every experts implementation present."
EXAMPLES = """
  deepseek-moe bench kernels
  deepseek-moe bench kernels --grid quick --output /tmp/bench
"""
_MAX_SECONDS = 3600
_MAX_OTHER_SHARE = 0.075  # of the machine's cores
_GPU_GRIDS = ("gpu", "lease")
_OWN = ("fused_moe", "fused_moe_fp8")  # FP8 computes with less precision: shown, but no other for `fused_moe`
_CELL = ("T", "H", "I", "E", "K", "routing", "dtype")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's options.

    Args:
        parser: The subcommand's parser.
    """
    parser.add_argument(
        "--grid", choices=["auto", "cpu", "gpu", "lease", "quick"], default="auto", help="which shapes to run"
    )
    parser.add_argument("--output", default="runs/bench-kernels", help="the run folder to write")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each shape and mode")
    parser.add_argument("--tune", action="store_true", help="find this GPU's fastest tiles first, and keep them")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run in the folder")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save; a cell is saved as soon as it is measured, and an interrupted run is taken up.

    Args:
        args: The parsed options.

    Returns:
        0, or 1 when `fused_moe` failed in a cell or nobody else ran.

    Raises:
        ValueError: The GPU grid or tuning is asked for where there is no GPU, or the time is out of range.
    """
    import torch
    from tqdm import tqdm

    from deepseek_cli.benchmarks.kernel_cells import GRIDS
    from deepseek_cli.benchmarks.kernel_peers import find_implementations
    from deepseek_cli.benchmarks.kernels import measure_cell
    from deepseek_records.run_folder import RunFolder
    from deepseek_records.summary import Result, Summary

    name = _check(args, torch.cuda.is_available())
    device = "cuda" if name in _GPU_GRIDS else "cpu"
    settings = {"grid": name, "seconds": args.seconds, "device": device, "num_threads": torch.get_num_threads()}
    folder = RunFolder.create(args.output, settings, command="bench kernels", seed=0, overwrite=args.overwrite)
    implementations, absent = find_implementations()
    for other, reason in absent.items():
        print(f"{other} is left out: {reason}")
    begun, rows = time.time(), _read_rows(folder.path)
    if args.tune:
        _tune(GRIDS[name])
    told: set[tuple[str, str]] = set()
    for cell in tqdm(GRIDS[name], desc="cells", unit="cell", dynamic_ncols=True):
        if any(_cell_of(row) == _cell_of(asdict(cell)) for row in rows):
            continue
        new = measure_cell(cell, device, args.seconds, implementations)
        rows += new
        _save(folder.path, rows, absent)
        tqdm.write(_format_rows(cell.title, new, told))
    speedups = compute_speedups(rows)
    failure = _find_failure(rows, speedups)
    if failure is not None:
        print(f"deepseek-moe bench kernels: {failure}; see {folder.path}/results.csv", file=sys.stderr)
        return 1
    whole = [entry for entry in speedups if entry["mode"] != "backward"]
    mean = math.exp(sum(math.log(entry["speedup"]) for entry in whole) / len(whole))
    print(
        f"geometric mean of fused_moe over the best other: {mean:.2f}x in {len(whole)} rows; {_describe_worst(whole)}"
    )
    _draw(folder.path / "plots" / "speedup.png", speedups, settings)
    result = Result(metric="speedup_geometric_mean", dataset=f"{name} grid", value=mean, n=len(whole))
    folder.finish(Summary(stage="bench", results=(result,), seconds=time.time() - begun))
    print(f"written to {folder.path}")
    return 0


def _check(args: argparse.Namespace, has_gpu: bool) -> str:
    """Return the grid's name; raise for options that cannot be served here."""
    if args.grid in _GPU_GRIDS and not has_gpu:
        raise ValueError(f"grid: got {args.grid}, expected cpu or quick: torch sees no GPU on this machine")
    if not 0 < args.seconds <= _MAX_SECONDS:
        raise ValueError(f"seconds: got {args.seconds}, expected more than 0 and at most {_MAX_SECONDS}")
    if args.tune and (not has_gpu or args.grid in ("cpu", "quick")):
        raise ValueError(f"tune: got grid {args.grid}, expected gpu on a machine with one: tiles are those of a GPU")
    return args.grid if args.grid != "auto" else ("gpu" if has_gpu else "cpu")


def _find_failure(rows: list[dict[str, Any]], speedups: list[dict[str, Any]]) -> str | None:
    """What keeps the run from counting as a measurement."""
    failed = _failures(rows)
    if failed:
        return f"fused_moe failed in {len(failed)} rows, first: {failed[0]['skipped']}"
    return None if speedups else "fused_moe and another ran no shape in common"


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a run that was interrupted."""
    from deepseek_records.json_files import read_object

    results = path / "results.json"
    if not results.exists():
        return []
    rows = read_object(results, "output").get("rows")
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "implementation" in row for row in rows):
        raise ValueError(f"output: {results} holds no rows of a benchmark; pass another --output, or --overwrite")
    failed = {_cell_of(row) for row in _failures(rows)}
    return [row for row in rows if _cell_of(row) not in failed]  # A failure is measured again.


def _failures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["implementation"] == "fused_moe" and "skipped" in row]


def _cell_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in _CELL)


def _save(path: Path, rows: list[dict[str, Any]], absent: dict[str, str]) -> None:
    from deepseek_records.run_folder import write_json, write_text

    results = {"rows": rows, "speedups": compute_speedups(rows), "absent": absent}
    if any(row["device"] == "cuda" for row in rows):
        import torch

        results["gpu"] = torch.cuda.get_device_name()
    write_json(path / "results.json", results)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path / "results.csv", table.getvalue())


def _tune(grid: list[Any]) -> None:
    """Find tiles for every shape of the grid, one with the rows per expert of another only once."""
    import torch

    from deepseek_kernels.gpu.tiles import row_bucket
    from deepseek_kernels.gpu.tune import tune

    shapes = {(c.H, c.I, row_bucket(c.T * c.K, c.E)): c for c in reversed(grid)}
    for hidden, width, bucket in shapes:
        c = shapes[hidden, width, bucket]
        print(f"tuning H={hidden} I={width}, as for T={c.T} E={c.E} K={c.K}", flush=True)
        best = tune(
            num_tokens=c.T,
            num_slots=c.K,
            hidden=hidden,
            width=width,
            num_experts=c.E,
            dtype=getattr(torch, c.dtype),
        )
        print(f"  {best}", flush=True)


def compute_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for every shape and mode that `fused_moe` and another ran, how many times faster it is than the best.

    FP8 of our own is no other: it computes with less precision.

    Args:
        rows: What `measure_cell` returned.
    """
    keys = (*_CELL, "mode")
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault(tuple(row[key] for key in keys), {})[row["implementation"]] = row
    speedups = []
    for key, times in groups.items():
        own = times.get("fused_moe")
        times = {name: row for name, row in times.items() if name not in _OWN}
        if own is None or not times:
            continue  # It failed, or nobody else ran: nothing to compare.
        best = min(times, key=lambda name: times[name]["ms"])
        speedup = times[best]["ms"] / own["ms"]
        errors = [row.get("ms_stderr", 0.0) / row["ms"] for row in (own, times[best])]
        entry = {**dict(zip(keys, key, strict=True)), "best_other": best, "speedup": speedup}
        speedups.append({**entry, "speedup_stderr": speedup * math.hypot(*errors)})
    return speedups


def _format_rows(title: str, rows: list[dict[str, Any]], told: set[tuple[str, str]]) -> str:
    """One cell's table; why somebody is missing is said once per run for each reason.

    Args:
        title: The shape.
        rows: What `measure_cell` returned.
        told: What has been said so far; added to.
    """
    columns = ("ms", "TFLOP/s", "of peak", "kept KiB/token", "peak MiB", "of copy speed")
    head = f"  {'mode':<17}{'implementation':<15}"
    lines = [f"\n{title} on {rows[0]['device']}", head + "".join(f"{column:>15}" for column in columns)]
    for row in rows:
        head = f"  {row['mode']:<17}{row['implementation']:<15}"
        if "skipped" in row:
            key = (row["implementation"], row["skipped"])
            lines += [] if key in told else [f"{head} skipped: {row['skipped']}"]
            told.add(key)
            continue
        cells = (
            f"{row['ms']:.2f}",
            f"{row['tflops']:.3f}",
            f"{row['share_of_matmul_peak']:.0%}",
            _in_units(row["kept_bytes_per_token"], 2**10),
            _in_units(row["peak_memory_bytes"], 2**20),
            f"{row['share_of_copy_peak']:.0%}" if "share_of_copy_peak" in row else "",
        )
        lines.append(head + "".join(f"{cell:>15}" for cell in cells))
    busy = max((row["other_work_cores"] or 0 for row in rows if "ms" in row), default=0)
    if rows[0]["device"] == "cpu" and busy > _MAX_OTHER_SHARE * os.cpu_count():
        lines.append(f"  other processes kept {busy:.1f} cores busy meanwhile: do not quote these figures")
    return "\n".join(lines)


def _in_units(num_bytes: float | None, unit: int) -> str:
    return "" if num_bytes is None else f"{num_bytes / unit:.1f}"


def _describe_worst(speedups: list[dict[str, Any]]) -> str:
    worst = min(speedups, key=lambda entry: entry["speedup"])
    shape = " ".join(str(worst[key]) for key in (*_CELL, "mode"))
    return f"worst {worst['speedup']:.2f}x at {shape}"


def _draw(path: Path, speedups: list[dict[str, Any]], settings: dict[str, Any]) -> None:
    try:  # Not in the common CUDA images, where kernels are measured.
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from deepseek_cli.benchmarks.kernel_cells import Cell

    path.parent.mkdir(exist_ok=True)
    labels = [f"{Cell(*_cell_of(s)).title} {s['mode']}" for s in speedups]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(labels)))
    bars = axes.barh(labels, [s["speedup"] - 1 for s in speedups], left=1, color="tab:blue")
    axes.bar_label(bars, [f"{s['speedup']:.2f}" for s in speedups], fontsize=5, padding=2)
    axes.set_xscale("log", base=2)  # twice as fast and half as fast are as far from 1
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("fused_moe: times as fast as the best other implementation")
    axes.set_title(", ".join(f"{name} {value}" for name, value in settings.items()), fontsize=8)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
