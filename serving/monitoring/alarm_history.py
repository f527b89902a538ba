"""Alarms that fire or fired: those that the page finds itself, and those that Alertmanager posts to it."""

import json
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

_KEPT = 200


class AlarmHistory:
    """What fired, from when to when.

    Args:
        path: A file of JSON lines to which every change goes, and from which an earlier page's alarms are read; None
            keeps them in memory.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                self._keep(json.loads(line))

    def tell(self, name: str, detail: str, is_firing: bool, text: str, at: float, source: str = "page") -> None:
        """Note what an alarm says now.

        Args:
            name: The alarm's.
            detail: What it is about, where one alarm can be about several things.
            is_firing: Whether it fires.
            text: One line for people.
            at: Unix time.
            source: Who says so.
        """
        with self._lock:
            key = (source, name, detail)
            last = next(
                (row for row in reversed(self._rows) if (row["source"], row["name"], row["detail"]) == key), None
            )
            is_open = last is not None and last["ended"] is None
            if is_firing and not is_open:
                self._add(
                    {"source": source, "name": name, "detail": detail, "text": text, "started": at, "ended": None}
                )
            elif not is_firing and is_open and last is not None:
                self._add({**last, "ended": at})

    def receive(self, body: dict[str, Any], now: Callable[[str], float] | None = None) -> int:
        """Note what Alertmanager posts, and return the number of alarms in it.

        Args:
            body: Its JSON.
            now: Turns its times into Unix time; for tests.
        """
        read = now or _unix_time
        alerts = body.get("alerts", [])
        for alert in alerts:
            labels = dict(alert["labels"])
            name = labels.pop("alertname", "")
            shown = {
                key: value for key, value in labels.items() if key not in ("job", "severity", "gen_ai_request_model")
            }
            detail = " ".join(f"{key}={value}" for key, value in sorted(shown.items()))
            is_firing = alert["status"] == "firing"
            at = read(alert["startsAt"] if is_firing else alert["endsAt"])
            self.tell(name, detail, is_firing, alert.get("annotations", {}).get("summary", ""), at, "Alertmanager")
        return len(alerts)

    def rows(self) -> list[dict[str, Any]]:
        """Return all, the newest first."""
        with self._lock:
            return sorted(self._rows, key=lambda row: -row["started"])

    def _add(self, row: dict[str, Any]) -> None:
        self._keep(row)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _keep(self, row: dict[str, Any]) -> None:
        key = ("source", "name", "detail", "started")
        self._rows = [old for old in self._rows if any(old[part] != row[part] for part in key)]
        self._rows = [*self._rows, row][-_KEPT:]


def _unix_time(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
