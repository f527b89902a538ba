"""Compares two runs on the items both answered: paired, so that the items' difficulty cancels.

    compare_runs("runs/before", "runs/after")["mmlu"]

Two runs whose error bars overlap may still differ for certain, because both saw the same questions; the paired test
looks only at the items where they disagree. What it does not show: whether the difference matters to anyone.

Reference: McNemar, 1947, "Note on the sampling error of the difference between correlated proportions",
Psychometrika 12.
"""

import json
import math
from pathlib import Path
from typing import Any

_PREFIX, _SUFFIX = "samples_", ".jsonl"


def compare_runs(first: str | Path, second: str | Path) -> dict[str, dict[str, Any]]:
    """Return, by task, the difference second minus first with its standard error and an exact p-value.

    Args:
        first: A run folder of `evaluate_model`.
        second: Another one.

    Raises:
        FileNotFoundError: A folder holds no samples.
        ValueError: The two share no task, or no item of one.
    """
    ours, theirs = _read_run(Path(first)), _read_run(Path(second))
    shared = [task for task in ours if task in theirs]
    if not shared:
        raise ValueError(f"runs: {first} ({', '.join(ours)}) and {second} ({', '.join(theirs)}) share no task")
    return {task: compare_hits(task, ours[task], theirs[task]) for task in shared}


def compare_hits(task: str, first: dict[str, float], second: dict[str, float]) -> dict[str, Any]:
    """Compare two sets of scores by item.

    Args:
        task: Named in errors.
        first: Score by item, 0 or 1, or a share over several samples.
        second: The same of the other run.

        Returns: ``difference`` (mean over shared items), ``stderr``, ``n``, ``num_better``, ``num_worse``, and
        ``p_value`` of the exact two-sided sign test over the items that differ.
    """
    names = [name for name in first if name in second]
    if not names:
        raise ValueError(f"runs: the two share no item of {task}")
    differences = [second[name] - first[name] for name in names]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((value - mean) ** 2 for value in differences) / (n - 1) if n > 1 else None
    better, worse = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return {
        "difference": mean,
        "stderr": None if variance is None else math.sqrt(variance / n),
        "n": n,
        "num_better": better,
        "num_worse": worse,
        "p_value": _sign_test(better, worse),
    }


def _sign_test(better: int, worse: int) -> float:
    """Probability of a split at least this uneven if either way were a coin's toss."""
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    # Integers until the last step: the powers overflow floats beyond a thousand items.
    return min(1.0, 2 * tail / 2**total) if total else 1.0


def _read_run(folder: Path) -> dict[str, dict[str, float]]:
    """Mean score by item, for every task in a run folder."""
    tasks = {}
    for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")):
        if path.name.endswith(f".partial{_SUFFIX}"):
            continue
        scores: dict[str, list[float]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            scores.setdefault(row["id"], []).append(float(row["acc"] if "acc" in row else row["passed"]))
        tasks[path.name[len(_PREFIX) : -len(_SUFFIX)]] = {name: sum(v) / len(v) for name, v in scores.items()}
    if not tasks:
        raise FileNotFoundError(f"run: {folder} holds no samples_<task>.jsonl; wanted a run folder of evaluate")
    return tasks
