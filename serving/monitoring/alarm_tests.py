"""Tests of the alarms for `promtool test rules`: made-up series, and which alarms must fire on them and which not."""

from typing import Any

from deepseek_serving.monitoring.alarms import JOB, AlarmSettings

_INSTANCE = f'instance="server",job="{JOB}"'
_DURATION = "gen_ai_server_request_duration_seconds"
# What a healthy server shows, each minute, for three hours.
_LENGTH = 180


def make_rule_tests(settings: AlarmSettings) -> dict[str, Any]:
    """Return the tests; they hold the rules at their times in service.

    Args:
        settings: Of the rules.
    """
    cases = [
        ("a clean time", {}, {}),
        ("one request in ten is slow", {"fast": "0+54x180"}, {"SlowRequests": 1}),
        ("one request in fifty is slow", {"fast": "0+58.8x180"}, {}),
        ("memory is nearly full", {"memory": f"{_above(settings.memory_ratio)}x180"}, {"MemoryHigh": 1}),
        ("the traffic has changed", {"drift": f"{settings.drift_nats * 1.2:g}x180"}, {"Drift": 1}),
        ("a small change, twice", {"warning": "1x180"}, {"DriftSignificant": 1}),
        ("the check stopped", {"checked": "-90000x180"}, {"DriftNotMeasured": 1}),
        ("an expert is dead", {"expert": "7x180"}, {"IdleExperts": 1}),
        ("the server is gone", {"up": "0x180"}, {"ServerDown": 1}),
        ("an evaluation fell", {"fell": "1x180"}, {"EvaluationFell": 1}),
    ]
    return {
        "rule_files": ["alerts.yml"],
        "evaluation_interval": "1m",
        "tests": [_make_case(settings, name, changes, fires) for name, changes, fires in cases],
    }


def _above(ratio: float) -> str:
    return f"{(1 + ratio) / 2:g}"


def _make_case(settings: AlarmSettings, name: str, changes: dict[str, str], fires: dict[str, int]) -> dict[str, Any]:
    values = {
        "up": "1x180",
        "count": "0+60x180",
        "fast": "0+60x180",
        "memory": "0.5x180",
        "drift": "0.01x180",
        "warning": "0x180",
        "checked": "0x180",
        "expert": "0+5000x180",
        "routed": "0+5000x180",
        "fell": "0x180",
    } | changes
    series = {
        f"up{{{_INSTANCE}}}": "up",
        f"{_DURATION}_count{{{_INSTANCE}}}": "count",
        f'{_DURATION}_bucket{{{_INSTANCE},le="{float(settings.latency_s)}"}}': "fast",
        f'deepseek_moe_memory_used_ratio{{{_INSTANCE},kind="machine"}}': "memory",
        f'deepseek_moe_drift_kl_nats{{{_INSTANCE},distribution="experts",layer="1"}}': "drift",
        f'deepseek_moe_drift_warning{{{_INSTANCE},distribution="experts",layer="1"}}': "warning",
        f"deepseek_moe_drift_checked_timestamp_seconds{{{_INSTANCE}}}": "checked",
        f'deepseek_moe_expert_tokens_total{{{_INSTANCE},layer="1",expert="0"}}': "expert",
        f'deepseek_moe_routed_tokens_total{{{_INSTANCE},layer="1"}}': "routed",
        f'deepseek_moe_evaluation_fell{{{_INSTANCE},task="mmlu"}}': "fell",
    }
    alarms = (
        *("SlowRequests", "ServerDown", "MemoryHigh", "Drift", "DriftSignificant", "DriftNotMeasured"),
        *("IdleExperts", "EvaluationFell"),
    )
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": text, "values": values[key]} for text, key in series.items()],
        # Counted, since annotations hold measured values.
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alarm}",alertstate="firing"}}) or vector(0)',
                "eval_time": f"{_LENGTH - 5}m",
                "exp_samples": [{"labels": "{}", "value": fires.get(alarm, 0)}],
            }
            for alarm in alarms
        ],
    }
