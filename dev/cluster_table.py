"""The table and ``results.json`` of `measure_on_cluster.sh`, from its runs and the times beside them.

python dev/cluster_table.py FOLDER SAVE_STEPS
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

# Steps that warm up.
_SKIPPED = 2


def read_losses(run: Path) -> list[float]:
    """Return the losses of a run's log."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def read_times(folder: Path, name: str) -> dict[str, list[float]] | None:
    """Return the seconds of a run's steps and of what stands between them, None where it was not timed."""
    path = folder / "times" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def checkpoint_bytes(run: Path) -> int:
    """Return the size of a run's last checkpoint, 0 where it has none."""
    folders = sorted(run.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return sum(file.stat().st_size for file in folders[-1].rglob("*") if file.is_file()) if folders else 0


def cost_of_saving(times: dict[str, list[float]], plain: dict[str, list[float]], save_steps: int) -> dict[str, float]:
    """Return what a checkpoint costs: how long all stands still, and how much longer the next step takes.

    Args:
        times: Of the run that saves.
        plain: Of the same run without checkpoints.
        save_steps: Steps from one to the next.
    """
    after = range(save_steps - 1, len(times["between"]), save_steps)  # the place between a saved step and the next
    return {
        "stands_still_s": statistics.fmean(times["between"][at] - plain["between"][at] for at in after),
        "next_step_s": statistics.fmean(times["steps"][at + 1] - plain["steps"][at + 1] for at in after),
    }


def describe(folder: Path, name: str, expected: list[float] | None, save_steps: int) -> dict[str, Any]:
    """Return what one run took, and how far its losses are from one process's."""
    run = folder / "runs" / name
    found: dict[str, Any] = {"losses": read_losses(run)}
    if expected:
        pairs = zip(found["losses"], expected, strict=True)
        found["largest_difference"] = max(abs(one / other - 1) for one, other in pairs)
    times, plain = read_times(folder, name), read_times(folder, name.partition("-saving")[0])
    if times:
        found |= {"step_s": statistics.median(times["steps"][_SKIPPED:]), **times}
    if times and plain and "-saving" in name:
        found |= {"checkpoint_bytes": checkpoint_bytes(run), **cost_of_saving(times, plain, save_steps)}
    return found


def main(folder: Path, save_steps: int) -> None:
    """Print a line per run, and write the numbers."""
    runs = [path.parent.name for path in sorted(folder.glob("runs/*/metrics.jsonl"))]
    alone = read_losses(folder / "runs" / "alone") if "alone" in runs else None
    results: dict[str, Any] = {"runs": {name: describe(folder, name, alone, save_steps) for name in runs}}
    base = results["runs"].get("alone", {}).get("step_s")
    titles = ("s per step", "of alone", "losses off by", "MB", "stands still, s", "next step, s")
    print(f"{'run':<34}" + "".join(f"{title:>16}" for title in titles))
    for name, one in results["runs"].items():
        cells = [
            f"{one['step_s']:.3f}" if "step_s" in one else "",
            f"{one['step_s'] / base:.2f}" if base and "step_s" in one else "",
            f"{one['largest_difference']:.1e}" if "largest_difference" in one else "",
            f"{one['checkpoint_bytes'] / 1e6:.1f}" if "checkpoint_bytes" in one else "",
            f"{one['stands_still_s']:+.3f}" if "stands_still_s" in one else "",
            f"{one['next_step_s']:+.3f}" if "next_step_s" in one else "",
        ]
        print(f"{name:<34}" + "".join(f"{cell:>16}" for cell in cells))
    exchange = folder / "times" / "exchange.json"
    if exchange.is_file():
        results["exchange"] = json.loads(exchange.read_text(encoding="utf-8"))
        for tokens, one in results["exchange"]["tokens"].items():
            print(f"all-to-all of {tokens} tokens: {one['ms']:.3f} ms, {one['gb_per_s']:.2f} GB/s to others")
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
