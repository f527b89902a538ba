"""What the server counts, in Prometheus' text format."""

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily
from torch import nn
from transformers import PreTrainedModel

from modeling_deepseek.families import find_moe_layers

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ExpertLoad:
    """Counts the tokens that each expert was chosen for, of any family whose routers return their choice.

    Args:
        model: The served model; each router gets a hook.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, torch.Tensor] = {}
        for layer in find_moe_layers(model):
            if layer.num_experts is not None:
                self._counts[layer.name] = torch.zeros(layer.num_experts, dtype=torch.int64, device=model.device)
                layer.router.register_forward_hook(self._make_hook(layer.name))

    def collect(self) -> Iterator[CounterMetricFamily]:
        """Yield the counts as Prometheus' client asks for them."""
        family = CounterMetricFamily(
            "deepseek_moe_expert_tokens", "Tokens that chose an expert", labels=["layer", "expert"]
        )
        with self._lock:
            counts = {name: count.tolist() for name, count in self._counts.items()}
        for name, of_layer in counts.items():
            for expert, number in enumerate(of_layer):
                family.add_metric([name, str(expert)], number)
        if counts:
            yield family

    def _make_hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        this = weakref.proxy(self)  # the model may outlive the server

        def count(_: nn.Module, __: Any, output: Any) -> None:
            chosen = output[2] if isinstance(output, tuple) and len(output) > 2 else None
            if chosen is not None and not chosen.is_floating_point():
                this.add(name, chosen)

        return count

    def add(self, name: str, topk_indices: torch.Tensor) -> None:
        """Count a batch's choice.

        Args:
            name: The layer.
            topk_indices: `[T, K]`; an index of E or more is an unused slot.
        """
        num_experts = len(self._counts[name])
        load = torch.bincount(topk_indices.flatten().clamp(max=num_experts), minlength=num_experts + 1)
        with self._lock:
            self._counts[name] += load[:num_experts]


class Metrics:
    """All counters of one server.

    Args:
        model: The served model.
        num_running: Asked for the requests in the batch.
        num_live: Asked for all requests that are taken on.
    """

    def __init__(self, model: PreTrainedModel, num_running: Callable[[], int], num_live: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._make(Counter, "requests", "Answers, by path and HTTP status", ["path", "status"])
        self.refused = self._make(Counter, "refused", "Requests that got no text, by reason", ["reason"])
        self.disconnected = self._make(Counter, "disconnected", "Requests whose reader went before the end")
        self.prompt_tokens = self._make(Counter, "prompt_tokens", "Tokens read")
        self.generated_tokens = self._make(Counter, "generated_tokens", "Tokens written")
        self.duration = self._make(Histogram, "request_duration_seconds", "From arrival to end", ["path"])
        self.first_token = self._make(Histogram, "time_to_first_token_seconds", "From arrival to the first token")
        self._make(Gauge, "requests_running", "In the batch now").set_function(num_running)
        self._make(Gauge, "requests_waiting", "Taken on and not yet in the batch").set_function(
            lambda: max(0, num_live() - num_running())
        )
        self._load = ExpertLoad(model)  # kept here: the hooks hold it weakly
        self.registry.register(self._load)
        ProcessCollector(registry=self.registry)

    def render(self) -> bytes:
        """Return the page."""
        return generate_latest(self.registry)

    def count_answers(self) -> tuple[int, int]:
        """Return the number of requests that were answered as they wished, and of all others."""
        answered = others = 0
        for family in self.requests.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    answered += int(sample.value) * (sample.labels["status"] == "200")
                    others += int(sample.value) * (sample.labels["status"] != "200")
        return answered, others

    def _make(self, kind: Any, name: str, text: str, labels: list[str] | None = None) -> Any:
        options = {"buckets": _SECONDS} if kind is Histogram else {}
        return kind(f"deepseek_moe_{name}", text, labels or [], registry=self.registry, **options)
