"""The same figures as a Grafana dashboard, for who has one: `deepseek-moe monitor rules` writes it beside the alarms.

Each panel is a title, a unit and the queries; a test runs every query against a live Prometheus.
"""

from typing import Any

from deepseek_serving.monitoring.alarms import JOB, AlarmSettings

_DURATION = "gen_ai_server_request_duration_seconds"
_OURS = f'job="{JOB}"'


def queries(settings: AlarmSettings) -> list[tuple[str, str, str, dict[str, str]]]:
    """Return each panel: title, Grafana's unit, kind, and queries by legend.

    Args:
        settings: Thresholds and times.
    """
    window = settings.time(60)

    def rate(name: str) -> str:
        return f"rate({name}{{{_OURS}}}[{window}])"

    def share(of: float, name: str = _DURATION) -> str:
        return f"histogram_quantile({of}, sum by (le) ({rate(name + '_bucket')}))"

    def mean(name: str) -> str:
        return f"sum({rate(name + '_sum')}) / sum({rate(name + '_count')})"

    def mine(name: str) -> str:
        return f"deepseek_moe_{name}{{{_OURS}}}"

    answers = rate("deepseek_moe_requests_total")
    return [
        ("Requests", "reqps", "timeseries", {"per second": f"sum({rate(_DURATION + '_count')})"}),
        (
            "Latency of whole answers",
            "s",
            "timeseries",
            {"half": share(0.5), "95 %": share(0.95)},
        ),
        (
            "Time to first token",
            "s",
            "timeseries",
            {"95 %": share(0.95, "gen_ai_server_time_to_first_token_seconds")},
        ),
        (
            "Time per token after it",
            "s",
            "timeseries",
            {"95 %": share(0.95, "gen_ai_server_time_per_output_token_seconds")},
        ),
        (
            "Tokens",
            "short",
            "timeseries",
            {
                "written per second": f"sum({rate('deepseek_moe_generated_tokens_total')})",
                "read per second": f"sum({rate('deepseek_moe_prompt_tokens_total')})",
            },
        ),
        (
            "Requests in the batch, and waiting",
            "short",
            "timeseries",
            {"running": f"sum({mine('requests_running')})", "waiting": f"sum({mine('requests_waiting')})"},
        ),
        (
            "Requests per pass",
            "short",
            "timeseries",
            {"mean": mean("deepseek_moe_batch_requests")},
        ),
        (
            "Answers by status",
            "reqps",
            "timeseries",
            {"{{status}}": f"sum by (status) ({answers})"},
        ),
        ("Memory", "percentunit", "timeseries", {"{{kind}}": mine("memory_used_ratio")}),
        ("Drift from the reference", "short", "timeseries", {"{{distribution}} {{layer}}": mine("drift_kl_nats")}),
        (
            "Experts per token",
            "short",
            "timeseries",
            {
                "{{layer}}": f"{rate('deepseek_moe_chosen_experts_total')} "
                f"/ on (instance, layer) {rate('deepseek_moe_routed_tokens_total')}"
            },
        ),
        (
            "Router entropy, nats",
            "short",
            "timeseries",
            {
                "{{layer}}": f"{rate('deepseek_moe_router_entropy_nats_total')} "
                f"/ on (instance, layer) {rate('deepseek_moe_routed_tokens_total')}"
            },
        ),
        (
            "Load of each expert",
            "short",
            "bargauge",
            {"{{layer}} {{expert}}": f"sum by (layer, expert) ({rate('deepseek_moe_expert_tokens_total')})"},
        ),
        ("Alarms", "short", "table", {"": 'ALERTS{alertstate="firing"}'}),
    ]


def make_dashboard(settings: AlarmSettings) -> dict[str, Any]:
    """Return the dashboard as Grafana imports it.

    Args:
        settings: Thresholds and times.
    """
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = []
    for place, (title, unit, kind, by_legend) in enumerate(queries(settings)):
        targets = [
            {"refId": chr(ord("A") + number), "expr": query, "legendFormat": legend, "datasource": source}
            for number, (legend, query) in enumerate(by_legend.items())
        ]
        panels.append(
            {
                "id": place + 1,
                "title": title,
                "type": kind,
                "datasource": source,
                "gridPos": {"x": 12 * (place % 2), "y": 8 * (place // 2), "w": 12, "h": 8},
                "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                "options": {},
                "targets": targets,
            }
        )
    return {
        "uid": "deepseek-moe",
        "title": "deepseek-moe",
        "schemaVersion": 41,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}]},
        "panels": panels,
    }
