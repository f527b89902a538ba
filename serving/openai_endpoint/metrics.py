"""What the server counts, in Prometheus' text format.

Times and tokens of a generation have the names of OpenTelemetry's conventions for generative AI, as Prometheus writes
them; everything else begins with `deepseek_moe_`. `docs/monitoring.md` lists all.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from deepseek_serving.monitoring.collectors import DriftCollector, MemoryCollector, RoutingCollector

if TYPE_CHECKING:
    from deepseek_serving.openai_endpoint.engine import Engine

# With 0.5 among them: the alarm on slow requests counts those above it.
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_POWERS = tuple(2**power for power in range(15))


class Metrics:
    """All counters of one server.

    Args:
        engine: What runs the model.
        name: The served name.
        requests_folder: Where counts per request go, and what `deepseek-moe monitor drift` found; None: nowhere.
    """

    def __init__(self, engine: "Engine", name: str, requests_folder: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self.name = name
        if engine.routing is not None:  # the first, since asking it counts what waits
            self.registry.register(RoutingCollector(engine.routing))
            engine.routing.on_pass = self._see_pass
        self.requests = self._make(Counter, "requests", "Answers, by path and HTTP status", ["path", "status"])
        self.refused = self._make(Counter, "refused", "Requests that got no text, by reason", ["reason"])
        self.disconnected = self._make(Counter, "disconnected", "Requests whose reader went before the end")
        self.prompt_tokens = self._make(Counter, "prompt_tokens", "Tokens of prompts that were taken on")
        self.generated_tokens = self._make(Counter, "generated_tokens", "Tokens written")
        self.http_duration = self._make(Histogram, "http_request_duration_seconds", "From arrival to end", ["path"])
        self.duration = self._make_gen_ai("request_duration", "From a request taken on to its end", ["error_type"])
        self.first_token = self._make_gen_ai("time_to_first_token", "From a request taken on to its first token")
        self.per_token = self._make_gen_ai(
            "time_per_output_token", "Between tokens, after the first", buckets=_SECONDS_PER_TOKEN
        )
        self.batch_requests = self._make(Histogram, "batch_requests", "Requests in one pass", buckets=_POWERS[:11])
        self.batch_tokens = self._make(Histogram, "batch_tokens", "Tokens in one pass", buckets=_POWERS)
        self._make(Gauge, "requests_running", "In the batch now").set_function(lambda: engine.num_running)
        self._make(Gauge, "requests_waiting", "Taken on and not yet in the batch").set_function(
            lambda: max(0, engine.num_live - engine.num_running)
        )
        self._make(Gauge, "model_info", "The served model", ["model"]).labels(name).set(1)
        self.registry.register(MemoryCollector())
        if requests_folder is not None:
            self.registry.register(DriftCollector(requests_folder))
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

    def _see_pass(self, num_requests: int, num_tokens: int) -> None:
        self.batch_requests.observe(num_requests)
        self.batch_tokens.observe(num_tokens)

    def _make(self, kind: Any, name: str, text: str, labels: list[str] | None = None, **options: Any) -> Any:
        if kind is Histogram:
            options.setdefault("buckets", _SECONDS)
        return kind(f"deepseek_moe_{name}", text, labels or [], registry=self.registry, **options)

    def _make_gen_ai(self, name: str, text: str, labels: list[str] | None = None, **options: Any) -> Any:
        """A histogram of the conventions, in seconds; with a label more it is asked for with that label."""
        options.setdefault("buckets", _SECONDS)
        names = ["gen_ai_request_model", *(labels or [])]
        whole = Histogram(f"gen_ai_server_{name}_seconds", text, names, registry=self.registry, **options)
        return whole if labels else whole.labels(self.name)
