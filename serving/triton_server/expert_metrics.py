"""Experts' load of the generating model among Triton's own metrics, under the endpoint's names.

`generation_model.py` keeps one. Triton serves metrics from its own process: a stub can only add to counters and set
gauges there, so the counts are handed over every few seconds.
"""

from collections.abc import Iterator
from typing import Any

import triton_python_backend_utils as pb_utils

from deepseek_serving.monitoring.collectors import RoutingCollector
from deepseek_serving.monitoring.routing_counts import RoutingCounts

EVERY_S = 2.0


class ExpertMetrics:
    """Hands on what the routers chose.

    Args:
        routing: The engine's counts.
        model: The model's name in Triton, a label of each figure.
    """

    def __init__(self, routing: RoutingCounts, model: str) -> None:
        self._collector = RoutingCollector(routing)
        self._model = model
        self._families: dict[str, Any] = {}
        self._figures: dict[tuple[str, ...], tuple[Any, bool]] = {}
        self._told: dict[tuple[str, ...], float] = {}

    def hand_over(self) -> None:
        """Bring Triton's figures up to date."""
        for name, is_counter, text, labels, value in self._read():
            key = (name, *labels.values())
            if key not in self._figures:
                self._figures[key] = self._make(name, text, labels, is_counter), is_counter
            figure, _ = self._figures[key]
            if not is_counter:
                figure.set(value)
            elif value > self._told.get(key, 0.0):
                figure.increment(value - self._told.get(key, 0.0))
                self._told[key] = value

    def _read(self) -> Iterator[tuple[str, bool, str, dict[str, str], float]]:
        for family in self._collector.collect():
            for sample in family.samples:
                if sample.value == sample.value:  # no token yet: nothing to tell
                    labels = {"model": self._model, **sample.labels}
                    yield sample.name, family.type == "counter", family.documentation, labels, sample.value

    def _make(self, name: str, text: str, labels: dict[str, str], is_counter: bool) -> Any:
        if name not in self._families:
            kinds = pb_utils.MetricFamily
            kind = kinds.COUNTER if is_counter else kinds.GAUGE
            self._families[name] = pb_utils.MetricFamily(name=name, description=text, kind=kind)
        return self._families[name].Metric(labels=labels)
