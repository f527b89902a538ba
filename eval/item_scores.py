"""Each item's score of a finished evaluation, of tasks of any kind: what a later evaluation is paired with.

`deepseek-moe monitor evaluate` keeps them. More is better in all of them, so that a fall means the same everywhere.
"""

import json
from pathlib import Path
from typing import Any

from deepseek_eval.comparison import sample_files


def read_item_scores(folder: str | Path) -> dict[str, dict[str, float]]:
    """Return, by task, each item's score.

    Right or wrong is 1 or 0, or the share of right samples; a text scores minus its bits per byte; a pair of sentences
    without a right one (CrowS-Pairs) 1 where the second, less stereotyped one is likelier.

    Args:
        folder: A run folder of `evaluate_model`.
    """
    return {task: _read(path) for task, path in sample_files(Path(folder)).items()}


def _read(path: Path) -> dict[str, float]:
    scores: dict[str, list[float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        scores.setdefault(row["id"], []).append(_score(row))
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _score(row: dict[str, Any]) -> float:
    for name in ("acc", "passed"):
        if name in row:
            return float(row[name])
    return -float(row["bits_per_byte"]) if "bits_per_byte" in row else float(row["choice"])
