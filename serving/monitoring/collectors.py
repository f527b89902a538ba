"""Routing, memory and drift as Prometheus' client asks for them; `openai_endpoint/metrics.py` registers them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deepseek_serving.monitoring.drift_report import read_drift
from deepseek_serving.monitoring.evaluations import read_evaluations
from deepseek_serving.monitoring.memory import read_memory
from deepseek_serving.monitoring.routing_counts import LayerTotals, RoutingCounts

# A model with more experts in all its layers gets figures per layer only.
MAX_EXPERT_SERIES = 4096


def _num_chosen(totals: LayerTotals) -> float:
    return float(totals.tokens_per_expert.sum())


def _num_idle(totals: LayerTotals) -> float:
    return float((totals.tokens_per_expert == 0).sum())


def _per_token(total: float, totals: LayerTotals) -> float:
    return total / totals.num_tokens if totals.num_tokens else float("nan")


def _imbalance(totals: LayerTotals) -> float:
    mean = totals.tokens_per_expert.mean()
    return float(totals.tokens_per_expert.max() / mean) if mean else float("nan")


_PER_LAYER: list[tuple[Any, str, str, Callable[[LayerTotals], float]]] = [
    (CounterMetricFamily, "routed_tokens", "Tokens that passed a router", lambda totals: totals.num_tokens),
    (CounterMetricFamily, "chosen_experts", "Experts chosen, over all tokens", _num_chosen),
    (CounterMetricFamily, "router_entropy_nats", "Of the router's softmax, over all tokens", lambda t: t.entropy),
    (GaugeMetricFamily, "experts_per_token", "Mean since the start", lambda t: _per_token(_num_chosen(t), t)),
    (GaugeMetricFamily, "router_entropy_mean_nats", "Mean since the start", lambda t: _per_token(t.entropy, t)),
    (GaugeMetricFamily, "load_imbalance", "Most loaded expert against the mean, since the start", _imbalance),
    (GaugeMetricFamily, "idle_experts", "Experts that no token chose since the start", _num_idle),
]


class RoutingCollector:
    """What the routers chose.

    Args:
        routing: The engine's counts.
    """

    def __init__(self, routing: RoutingCounts) -> None:
        self.routing = routing

    def collect(self) -> Iterator[Metric]:
        """Yield one family per figure."""
        self.routing.flush()
        told = [totals for totals in self.routing.totals if totals.num_tokens or not self.routing.num_passes]
        if sum(len(totals.tokens_per_expert) for totals in told) <= MAX_EXPERT_SERIES:
            family = CounterMetricFamily(
                "deepseek_moe_expert_tokens", "Tokens that chose an expert", labels=["layer", "expert"]
            )
            for totals in told:
                for expert, number in enumerate(totals.tokens_per_expert.tolist()):
                    family.add_metric([totals.name, str(expert)], number)
            yield family
        for kind, name, text, value in _PER_LAYER:
            family = kind(f"deepseek_moe_{name}", text, labels=["layer"])
            for totals in told:
                family.add_metric([totals.name], value(totals))
            yield family


class MemoryCollector:
    """Memory used and there, by kind."""

    def collect(self) -> Iterator[Metric]:
        """Yield bytes and the share that is used."""
        used = GaugeMetricFamily("deepseek_moe_memory_used_bytes", "In use, by kind", labels=["kind"])
        limit = GaugeMetricFamily("deepseek_moe_memory_limit_bytes", "What there is", labels=["kind"])
        ratio = GaugeMetricFamily("deepseek_moe_memory_used_ratio", "Share that is used", labels=["kind"])
        for memory in read_memory():
            used.add_metric([memory.kind], memory.used_bytes)
            limit.add_metric([memory.kind], memory.limit_bytes)
            ratio.add_metric([memory.kind], memory.used_bytes / memory.limit_bytes)
        yield from (used, limit, ratio)


class DriftCollector:
    """What `deepseek-moe monitor drift` last wrote.

    Args:
        folder: With the requests' counts.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Metric]:
        """Yield the last check's figures, and the last evaluations'; nothing before the first."""
        yield from self._collect_evaluations()
        report = read_drift(self.folder)
        if report is None:
            return
        names = ["distribution", "layer"]
        kl = GaugeMetricFamily("deepseek_moe_drift_kl_nats", "KL to the reference less the null's mean", labels=names)
        p = GaugeMetricFamily("deepseek_moe_drift_p_value", "After Holm, over all distributions", labels=names)
        warned = GaugeMetricFamily("deepseek_moe_drift_warning", "1: significant in two checks in a row", labels=names)
        for row in report["rows"]:
            labels = [row["distribution"], row["layer"]]
            if row["corrected"] is not None:
                kl.add_metric(labels, row["corrected"])
            p.add_metric(labels, row["p_holm"])
            warned.add_metric(labels, float(row["is_warning"]))
        yield from (kl, p, warned)
        checked = GaugeMetricFamily("deepseek_moe_drift_checked_timestamp_seconds", "When drift was last measured")
        checked.add_metric([], report["checked_at"])
        yield checked

    def _collect_evaluations(self) -> Iterator[Metric]:
        score = GaugeMetricFamily("deepseek_moe_evaluation_score", "The last evaluation's", labels=["task"])
        fell = GaugeMetricFamily("deepseek_moe_evaluation_fell", "1: significantly below the first", labels=["task"])
        for task, row in {row["task"]: row for row in read_evaluations(self.folder)}.items():
            score.add_metric([task], row["score"])
            fell.add_metric([task], float(row["fell"]))
        if score.samples:
            yield from (score, fell)
