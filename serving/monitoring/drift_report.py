"""The file in which `deepseek-moe monitor drift` leaves what it found, and from which /metrics and the page read."""

import json
from pathlib import Path
from typing import Any

REPORT = "drift.json"
HISTORY = "drift_history.jsonl"

_cache: dict[str, tuple[int, dict[str, Any]]] = {}


def read_drift(folder: str | Path) -> dict[str, Any] | None:
    """Return the last check of a folder's requests; None before the first.

    Args:
        folder: Where the requests' counts are.
    """
    path = Path(folder) / REPORT
    try:
        changed = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    known = _cache.get(str(path))
    if known is None or known[0] != changed:
        _cache[str(path)] = changed, json.loads(path.read_text(encoding="utf-8"))
    return _cache[str(path)][1]


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Return every check, the oldest first.

    Args:
        folder: Where the requests' counts are.
    """
    path = Path(folder) / HISTORY
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
