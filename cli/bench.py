"""``deepseek-moe bench``: side-by-side tables of the kernels, printed and saved.

Writes ``results.json``, ``results.csv`` and ``plots/speedup.png`` into a run folder.
"""

import argparse
import csv
import json
import math
import time

HELP = "Time the fused MoE layer against every experts implementation present."
EXAMPLES = """
  deepseek-moe bench kernels
  deepseek-moe bench kernels --grid quick --output /tmp/bench
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this subcommand's options.

    Args:
        parser: The subcommand's parser.
    """
    parser.add_argument("what", choices=["kernels"], help="what to time")
    parser.add_argument("--grid", choices=["auto", "cpu", "gpu", "quick"], default="auto", help="which shapes to run")
    parser.add_argument("--output", default="runs/bench-kernels", help="the run folder to write")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for each shape and mode")
    parser.add_argument("--tune", action="store_true", help="find this GPU's fastest tiles first, and keep them")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished run in the folder")


def run(args: argparse.Namespace) -> int:
    """Measure, print and save.

    Args:
        args: The parsed options.

    Raises:
        ValueError: The GPU grid or tuning is asked for where there is no GPU, or the time is not positive.
    """
    import torch

    from deepseek_cli import kernel_benchmark
    from deepseek_model_cards.run_folder import RunFolder

    has_gpu = torch.cuda.is_available()
    if args.grid == "gpu" and not has_gpu:
        raise ValueError("grid: got gpu, wanted cpu or quick: torch sees no GPU on this machine")
    if not args.seconds > 0:
        raise ValueError(f"seconds: got {args.seconds}, wanted more than 0")
    if args.tune and (not has_gpu or args.grid in ("cpu", "quick")):
        raise ValueError(f"tune: got grid {args.grid}, wanted gpu on a machine with one: tiles are those of a GPU")
    name = args.grid if args.grid != "auto" else ("gpu" if has_gpu else "cpu")
    grid = {
        "cpu": kernel_benchmark.CPU_GRID,
        "gpu": kernel_benchmark.GPU_GRID,
        "quick": kernel_benchmark.QUICK_GRID,
    }[name]
    device = "cuda" if name == "gpu" else "cpu"
    settings = {"grid": name, "seconds": args.seconds, "device": device, "num_threads": torch.get_num_threads()}
    folder = RunFolder.create(args.output, settings, command="bench kernels", seed=0, overwrite=args.overwrite)
    begun, rows = time.time(), []
    if args.tune:
        _tune(grid)
    for cell in grid:
        new = kernel_benchmark.measure_cell(cell, device, args.seconds)
        rows += new
        _print_rows(new)
    speedups = compute_speedups(rows)
    (folder.path / "results.json").write_text(json.dumps({"rows": rows, "speedups": speedups}, indent=1))
    _write_csv(folder.path / "results.csv", rows)
    if not speedups:
        raise ValueError(f"bench: fused_moe and another ran no shape in common; see {folder.path}/results.csv")
    mean = math.exp(sum(math.log(entry["speedup"]) for entry in speedups) / len(speedups))
    print(f"geometric mean of fused_moe over the best other: {mean:.2f}x; worst {_worst(speedups)}")
    _draw(folder.path / "plots" / "speedup.png", speedups, settings)
    folder.finish(
        {
            "stage": "bench",
            "results": [
                {"metric": "speedup_geometric_mean", "dataset": f"{name} grid", "value": mean, "n": len(speedups)}
            ],
            "seconds": time.time() - begun,
        }
    )
    print(f"written to {folder.path}")
    return 0


def _tune(grid: list) -> None:
    """Find tiles for every shape of the grid, one with the rows per expert of another only once."""
    import torch

    from deepseek_kernels.tiles import row_bucket
    from deepseek_kernels.tune import tune

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


def compute_speedups(rows: list[dict]) -> list[dict]:
    """Return, for every shape and mode that `fused_moe` and another ran, how many times faster it is than the best.

    Args:
        rows: What `kernel_benchmark.measure_cell` returned.
    """
    keys = ("T", "H", "I", "E", "K", "routing", "dtype", "mode")
    groups: dict[tuple, dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            groups.setdefault(tuple(row[key] for key in keys), {})[row["implementation"]] = row["ms"]
    speedups = []
    for key, times in groups.items():
        own = times.pop("fused_moe", None)
        if own is None or not times:
            continue  # It failed, or nobody else ran: nothing to compare.
        best = min(times, key=times.get)
        speedups.append({**dict(zip(keys, key, strict=True)), "best_other": best, "speedup": times[best] / own})
    return speedups


def _print_rows(rows: list[dict]) -> None:
    cell = rows[0]
    shape = " ".join(f"{axis}={cell[axis]}" for axis in "THIEK")
    print(f"\n{shape} {cell['routing']} {cell['dtype']} on {cell['device']}")
    print(f"  {'mode':<17}{'implementation':<16}{'ms':>9}{'TFLOP/s':>9}{'of peak':>9}{'kept KiB/token':>16}")
    for row in rows:
        if "skipped" in row:
            print(f"  {row['mode']:<17}{row['implementation']:<16} skipped: {row['skipped']}")
            continue
        kept = row["kept_bytes_per_token"]
        print(
            f"  {row['mode']:<17}{row['implementation']:<16}{row['ms']:>9.2f}{row['tflops']:>9.3f}"
            f"{row['share_of_matmul_peak']:>9.0%}{'' if kept is None else f'{kept / 1024:.1f}':>16}",
            flush=True,
        )


def _worst(speedups: list[dict]) -> str:
    worst = min(speedups, key=lambda entry: entry["speedup"])
    return f"{worst['speedup']:.2f}x at " + " ".join(
        str(worst[key]) for key in ("T", "H", "I", "E", "K", "dtype", "mode")
    )


def _write_csv(path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def _draw(path, speedups: list[dict], settings: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path.parent.mkdir(exist_ok=True)
    labels = [
        f"T={s['T']} H={s['H']} I={s['I']} E={s['E']} K={s['K']} {s['routing']} {s['dtype']} {s['mode']}"
        for s in speedups
    ]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.22 * len(labels)))
    axes.barh(labels, [s["speedup"] for s in speedups], color="tab:blue")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=6)
    axes.set_xlabel("fused_moe: times as fast as the best other implementation")
    axes.set_title(", ".join(f"{name} {value}" for name, value in settings.items()), fontsize=8)
    figure.savefig(path, bbox_inches="tight", dpi=120)
    pyplot.close(figure)
