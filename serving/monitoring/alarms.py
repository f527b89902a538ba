"""Alarms as Prometheus and Alertmanager read them: rules, both configurations, and tests of the rules for promtool.

The defaults are the article's: requests slower than 500 ms in real time, memory above 90 % over 5 minutes, drift above
0.15 nats in the daily check. Beside them stand alarms on what would look like silence: a server that is gone, and a
drift check that no longer runs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB = "deepseek-moe"
# The server's buckets: only what falls on a boundary is counted and not interpolated.
BOUNDARIES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SLOW_SHARE = 0.05
_DAY = 86400


@dataclass(frozen=True)
class AlarmSettings:
    """What the files say.

    Attributes:
        target: Host and port of the server.
        webhook: Where Alertmanager posts alarms.
        latency_s: Requests slower than this are slow; one of the histogram's boundaries.
        memory_ratio: Share of memory.
        drift_nats: Corrected KL to the reference.
        time_scale: Factor of every time in the files, for tests; 1 in service.
        api_key_file: A file with the server's key, for Prometheus to send.
        alertmanager: Host and port, for Prometheus.
    """

    target: str = "127.0.0.1:8000"
    webhook: str = "http://127.0.0.1:8090/alerts"
    latency_s: float = 0.5
    memory_ratio: float = 0.9
    drift_nats: float = 0.15
    time_scale: float = 1.0
    api_key_file: str | None = None
    alertmanager: str = "127.0.0.1:9093"

    def __post_init__(self) -> None:
        if self.latency_s not in BOUNDARIES:
            known = ", ".join(f"{boundary:g}" for boundary in BOUNDARIES)
            raise ValueError(
                f"--latency: got {self.latency_s:g}, expected one of {known} (the histogram's boundaries)"
            )
        if not 0 < self.memory_ratio < 1:
            raise ValueError(f"--memory: got {self.memory_ratio:g}, expected a share between 0 and 1")
        if not 0 < self.drift_nats < 100:
            raise ValueError(f"--drift: got {self.drift_nats:g}, expected nats above 0")

    def time(self, seconds: float) -> str:
        """Return a time as Prometheus writes it."""
        milliseconds = round(seconds * 1000 * self.time_scale)
        return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def make_rules(settings: AlarmSettings) -> dict[str, Any]:
    """Return Prometheus' rules.

    Args:
        settings: Thresholds and times.
    """
    time = settings.time
    return {
        "groups": [
            _group("latency", time(15), [_latency(settings), _server_down(settings)]),
            _group("memory", time(300), [_memory(settings)]),
            _group("drift", time(300), _drift(settings)),
            _group("experts", time(300), [_dead_experts(settings), _evaluation(settings)]),
        ]
    }


def _group(name: str, interval: str, rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"name": f"deepseek-moe-{name}", "interval": interval, "rules": rules}


def _rule(name: str, expression: str, severity: str, text: str, lasts: str | None = None) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": name, "expr": expression}
    if lasts is not None:
        rule["for"] = lasts
    return rule | {"labels": {"severity": severity}, "annotations": {"summary": text}}


def _latency(settings: AlarmSettings) -> dict[str, Any]:
    window = settings.time(60)
    metric = "gen_ai_server_request_duration_seconds"
    fast = f'sum by (instance) (rate({metric}_bucket{{le="{float(settings.latency_s)}"}}[{window}]))'
    all_of_them = f"sum by (instance) (rate({metric}_count[{window}]))"
    return _rule(
        "SlowRequests",
        f"1 - {fast} / {all_of_them} > {_SLOW_SHARE}",
        "critical",
        f"{{{{ $value | humanizePercentage }}}} of the requests take more than {settings.latency_s * 1000:g} ms",
        settings.time(60),
    )


def _server_down(settings: AlarmSettings) -> dict[str, Any]:
    text = "{{ $labels.instance }} does not answer"
    return _rule("ServerDown", f'up{{job="{JOB}"}} == 0', "critical", text, settings.time(60))


def _memory(settings: AlarmSettings) -> dict[str, Any]:
    return _rule(
        "MemoryHigh",
        f"avg_over_time(deepseek_moe_memory_used_ratio[{settings.time(300)}]) > {settings.memory_ratio:g}",
        "critical",
        "{{ $value | humanizePercentage }} of the memory ({{ $labels.kind }}) is used",
    )


def _drift(settings: AlarmSettings) -> list[dict[str, Any]]:
    where = "{{ $labels.distribution }} {{ $labels.layer }}"
    age = f"time() - deepseek_moe_drift_checked_timestamp_seconds > {25 * 3600 * settings.time_scale:g}"
    absent = f'absent(deepseek_moe_drift_checked_timestamp_seconds{{job="{JOB}"}})'
    return [
        _rule(
            "Drift",
            f"deepseek_moe_drift_kl_nats > {settings.drift_nats:g}",
            "critical",
            f"{where}: {{{{ $value }}}} nats from the reference; deepseek-moe monitor drift names what moved",
        ),
        _rule(
            "DriftSignificant",
            "deepseek_moe_drift_warning > 0",
            "warning",
            f"{where}: significant in two checks in a row",
        ),
        _rule(
            "DriftNotMeasured",
            f"{age} or {absent}",
            "warning",
            "deepseek-moe monitor drift has not run for a day",
            settings.time(3600),
        ),
    ]


def _dead_experts(settings: AlarmSettings) -> dict[str, Any]:
    window = settings.time(3600)
    return _rule(
        "IdleExperts",
        f"count by (instance, layer) (increase(deepseek_moe_expert_tokens_total[{window}]) == 0) "
        f"and on (instance, layer) increase(deepseek_moe_routed_tokens_total[{window}]) > 100000",
        "warning",
        "{{ $value }} experts of {{ $labels.layer }} got no token in an hour",
    )


def _evaluation(settings: AlarmSettings) -> dict[str, Any]:
    text = "{{ $labels.task }}: significantly worse than the first evaluation"
    return _rule("EvaluationFell", "deepseek_moe_evaluation_fell > 0", "critical", text)


def make_prometheus(settings: AlarmSettings) -> dict[str, Any]:
    """Return Prometheus' configuration.

    Args:
        settings: Addresses and times.
    """
    scrape: dict[str, Any] = {"job_name": JOB, "static_configs": [{"targets": [settings.target]}]}
    if settings.api_key_file is not None:
        scrape["authorization"] = {"credentials_file": str(Path(settings.api_key_file).resolve())}
    every = settings.time(15)
    return {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": ["alerts.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [settings.alertmanager]}]}]},
        "scrape_configs": [scrape],
    }


def make_alertmanager(settings: AlarmSettings) -> dict[str, Any]:
    """Return Alertmanager's configuration.

    Args:
        settings: Webhook and times.
    """
    # Alertmanager knows no part of a second in its route: one second is the least.
    least = max(settings.time_scale, 1 / 10)
    return {
        "route": {
            "receiver": "webhook",
            "group_by": ["alertname", "instance"],
            "group_wait": f"{max(1, round(10 * least))}s",
            "group_interval": f"{max(1, round(60 * least * settings.time_scale))}s",
            "repeat_interval": "4h",
        },
        "receivers": [
            {"name": "webhook", "webhook_configs": [{"url": settings.webhook, "send_resolved": True}]},
        ],
    }
