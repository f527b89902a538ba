"""Reads a server's /metrics again and again, and keeps what the page shows: the last hour, alarms, drift, experts.

Any server that counts as ours does can be watched; what it does not count is left out. `page.py` serves the result.
"""

import math
import threading
import time
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from deepseek_serving.monitoring.alarm_history import AlarmHistory
from deepseek_serving.monitoring.alarms import AlarmSettings
from deepseek_serving.monitoring.drift_report import read_drift, read_history
from deepseek_serving.monitoring.evaluations import read_evaluations
from deepseek_serving.monitoring.request_counts import RequestTable

_KEPT_S = 3600.0
_WINDOW_S = 60.0
# Of fewer answers in a minute, one that is slow says nothing.
_MIN_ANSWERS = 20
_DURATION = "gen_ai_server_request_duration_seconds"
_FIRST = "gen_ai_server_time_to_first_token_seconds"

Labels = frozenset[tuple[str, str]]
Samples = dict[str, dict[Labels, float]]


def parse(text: str) -> Samples:
    """Return every sample of a metrics page, by name and labels.

    Args:
        text: Prometheus' text format.
    """
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def total(samples: Samples, name: str) -> float:
    """Return the sum of a metric over its labels; 0 where there is none."""
    return sum(samples.get(name, {}).values())


def quantile(now: Samples, before: Samples, name: str, share: float) -> float | None:
    """Return a quantile of what a histogram saw between two pages, in its unit; None if that is nothing.

    Args:
        now: The later page.
        before: The earlier.
        name: The histogram's.
        share: For example 0.95.
    """
    counts: dict[float, float] = {}
    for sign, samples in ((1, now), (-1, before)):
        for labels, value in samples.get(f"{name}_bucket", {}).items():
            bound = float(dict(labels)["le"])
            counts[bound] = counts.get(bound, 0.0) + sign * value
    bounds = sorted(counts)
    if not bounds or counts[bounds[-1]] <= 0:
        return None
    wanted, low, below = share * counts[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= wanted:
            if math.isinf(bound):
                return low
            inside = counts[bound] - below
            return bound if inside == 0 else low + (bound - low) * (wanted - below) / inside
        low, below = bound, counts[bound]
    return low


@dataclass
class _Page:
    at: float
    samples: Samples


@dataclass
class Watch:
    """What is known of one server.

    Attributes:
        url: The server's, without a path.
        every_s: Between two looks.
        settings: Thresholds of the alarms.
        requests_folder: Where drift reports and evaluations lie; None: only what /metrics says.
        reference: For the experts at release; None: without.
        api_key: The server's.
        alarms: What fired and when.
    """

    url: str
    every_s: float = 2.0
    settings: AlarmSettings = field(default_factory=AlarmSettings)
    requests_folder: Path | None = None
    reference: RequestTable | None = None
    api_key: str | None = None
    alarms: AlarmHistory = field(default_factory=AlarmHistory)

    def __post_init__(self) -> None:
        self._pages: deque[_Page] = deque()
        self._series: deque[dict[str, Any]] = deque()
        self._lock = threading.Lock()
        self._failed: str | None = None

    def run(self, stop: threading.Event) -> None:
        """Look until told to stop."""
        while not stop.is_set():
            self.look()
            stop.wait(self.every_s)

    def look(self) -> None:
        """Read the server's page once."""
        request = urllib.request.Request(f"{self.url}/metrics")
        if self.api_key is not None:
            request.add_header("Authorization", f"Bearer {self.api_key}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                page = _Page(time.time(), parse(answer.read().decode()))
        except (OSError, ValueError) as error:
            with self._lock:
                self._failed = str(error)
            self.alarms.tell("ServerDown", "", True, f"{self.url} does not answer", time.time())
            return
        with self._lock:
            self._failed = None
            self._pages.append(page)
            while page.at - self._pages[0].at > _WINDOW_S and len(self._pages) > 2:
                self._pages.popleft()
            point = self._describe_point(page, self._pages[0])
            self._series.append(point)
            while page.at - self._series[0]["t"] > _KEPT_S:
                self._series.popleft()
        self._check(page, point)

    def state(self) -> dict[str, Any]:
        """Return everything as the page's script reads it."""
        with self._lock:
            last = self._pages[-1] if self._pages else None
            first = self._pages[0] if self._pages else None
            series, failed = list(self._series), self._failed
        drift = None if self.requests_folder is None else read_drift(self.requests_folder)
        return {
            "url": self.url,
            "failed": failed,
            "model": None if last is None else _label(last.samples, "deepseek_moe_model_info", "model"),
            "every_s": self.every_s,
            "thresholds": {
                "latency_s": self.settings.latency_s,
                "memory": self.settings.memory_ratio,
                "drift": self.settings.drift_nats,
            },
            "series": series,
            "layers": [] if last is None or first is None else self._layers(last.samples, first.samples),
            "drift": drift,
            "drift_history": [] if self.requests_folder is None else _drift_history(self.requests_folder),
            "alarms": self.alarms.rows(),
            "evaluations": [] if self.requests_folder is None else read_evaluations(self.requests_folder),
        }

    def _describe_point(self, page: _Page, before: _Page) -> dict[str, Any]:
        now, then, seconds = page.samples, before.samples, max(page.at - before.at, 1e-9)

        def rate(name: str) -> float:
            return max(0.0, total(now, name) - total(then, name)) / seconds

        count = total(now, f"{_DURATION}_count") - total(then, f"{_DURATION}_count")
        fast = _bucket(now, self.settings.latency_s) - _bucket(then, self.settings.latency_s)
        return {
            "t": page.at,
            "requests_per_s": rate(f"{_DURATION}_count"),
            "tokens_per_s": rate("deepseek_moe_generated_tokens_total"),
            "p50_s": quantile(now, then, _DURATION, 0.5),
            "p95_s": quantile(now, then, _DURATION, 0.95),
            "first_p95_s": quantile(now, then, _FIRST, 0.95),
            "slow_share": None if count <= 0 else 1 - fast / count,
            "num_answers": count,
            "running": total(now, "deepseek_moe_requests_running"),
            "waiting": total(now, "deepseek_moe_requests_waiting"),
            "memory": {
                dict(labels)["kind"]: value for labels, value in now.get("deepseek_moe_memory_used_ratio", {}).items()
            },
        }

    def _layers(self, now: Samples, before: Samples) -> list[dict[str, Any]]:
        """Each layer's load in the last minute, or since the start where that was idle, beside the reference's."""
        name = "deepseek_moe_expert_tokens_total"
        loads: dict[str, dict[int, float]] = {}
        for labels, value in now.get(name, {}).items():
            parts = dict(labels)
            earlier = before.get(name, {}).get(labels, 0.0)
            loads.setdefault(parts["layer"], {})[int(parts["expert"])] = value - earlier
        if not any(sum(load.values()) for load in loads.values()):
            for labels, value in now.get(name, {}).items():
                loads[dict(labels)["layer"]][int(dict(labels)["expert"])] = value
        entropy = {
            dict(labels)["layer"]: value
            for labels, value in now.get("deepseek_moe_router_entropy_mean_nats", {}).items()
        }
        per_token = {
            dict(labels)["layer"]: value for labels, value in now.get("deepseek_moe_experts_per_token", {}).items()
        }
        return [
            {
                "name": layer,
                "now": _shares([load[expert] for expert in sorted(load)]),
                "reference": self._reference_shares(layer),
                "entropy": _finite(entropy.get(layer)),
                "experts_per_token": _finite(per_token.get(layer)),
            }
            for layer, load in loads.items()
        ]

    def _reference_shares(self, layer: str) -> list[float] | None:
        if self.reference is None or layer not in self.reference.layers:
            return None
        place = self.reference.layers.index(layer)
        begin = sum(self.reference.sizes[:place])
        counts = self.reference.expert_tokens[:, begin : begin + self.reference.sizes[place]].sum(0)
        return _shares(counts.tolist())

    def _check(self, page: _Page, point: dict[str, Any]) -> None:
        tell, at, settings = self.alarms.tell, page.at, self.settings
        tell("ServerDown", "", False, "", at)
        slow = point["slow_share"]
        is_slow = slow is not None and slow > 0.05 and point["num_answers"] >= _MIN_ANSWERS
        tell("SlowRequests", "", is_slow, f"{slow or 0:.0%} of a minute's requests over {settings.latency_s:g} s", at)
        for kind in point["memory"]:
            recent = [one["memory"].get(kind, 0.0) for one in self._series if at - one["t"] <= 300]
            mean = sum(recent) / len(recent)
            tell("MemoryHigh", kind, mean > settings.memory_ratio, f"{mean:.0%} of the {kind}'s memory", at)
        for labels, value in page.samples.get("deepseek_moe_drift_kl_nats", {}).items():
            parts = dict(labels)
            name = f"{parts['distribution']} {parts['layer']}".strip()
            tell("Drift", name, value > settings.drift_nats, f"{name}: {value:.2f} nats from the reference", at)
        for labels, value in page.samples.get("deepseek_moe_evaluation_fell", {}).items():
            task = dict(labels)["task"]
            tell("EvaluationFell", task, value > 0, f"{task}: significantly below the first evaluation", at)


def _bucket(samples: Samples, bound: float) -> float:
    found = samples.get(f"{_DURATION}_bucket", {})
    return sum(value for labels, value in found.items() if float(dict(labels)["le"]) == bound)


def _shares(counts: list[float]) -> list[float]:
    whole = sum(counts)
    return [count / whole if whole else 0.0 for count in counts]


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _label(samples: Samples, name: str, label: str) -> str | None:
    return next((dict(labels)[label] for labels in samples.get(name, {})), None)


def _drift_history(folder: Path) -> list[dict[str, Any]]:
    """The last 60 checks, each distribution's corrected or raw KL."""
    return [
        {
            "t": check["checked_at"],
            "kl": {
                f"{row['distribution']} {row['layer']}".strip(): row["raw"] - row["null_mean"] for row in check["rows"]
            },
        }
        for check in read_history(folder)[-60:]
    ]
