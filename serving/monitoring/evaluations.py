"""Scheduled evaluations of a served model: results side by side, and a paired test against the first.

`deepseek-moe monitor evaluate` writes them; /metrics and the page read `evaluations.jsonl`.
"""

import json
import math
from pathlib import Path
from typing import Any

FILE_NAME = "evaluations.jsonl"
FELL_P = 0.01


def read_evaluations(folder: str | Path) -> list[dict[str, Any]]:
    """Return every evaluation, the oldest first.

    Args:
        folder: Where they are written.
    """
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def add_evaluation(folder: Path, at: float, task: str, scores: dict[str, float]) -> dict[str, Any]:
    """Add one evaluation, compared with the task's first on the items that both have, and return it.

    Args:
        folder: Is made if need be.
        at: Unix time.
        task: Its name.
        scores: By item, 0 to 1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = next((row for row in read_evaluations(folder) if row["task"] == task), None)
    fell, p = (False, None) if first is None else compare(first["scores"], scores)
    row = {
        "at": at,
        "task": task,
        "score": sum(scores.values()) / len(scores),
        "n": len(scores),
        "p": p,
        "fell": fell,
        "scores": scores,
    }
    with open(folder / FILE_NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


def compare(before: dict[str, float], now: dict[str, float]) -> tuple[bool, float | None]:
    """Return whether scores fell significantly, and the p-value of an exact one-sided sign test on paired items.

    Args:
        before: By item.
        now: By item.
    """
    both = before.keys() & now.keys()
    worse = sum(now[item] < before[item] for item in both)
    better = sum(now[item] > before[item] for item in both)
    if not both:
        return False, None
    changed = worse + better
    p = sum(math.comb(changed, number) for number in range(worse, changed + 1)) / 2**changed
    return p < FELL_P, p
