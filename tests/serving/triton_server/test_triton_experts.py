"""Triton's own metrics tell what the experts of the generating model do, as the endpoint's do."""

import time
import urllib.request

import pytest
from endpoint_server import make_tokenizer
from prometheus_client.parser import text_string_to_metric_families
from triton_running import triton, triton_client

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]
# The supervisor asks for a token from time to time.
PROBES = 4
PROMPTS = ["The King", "a", "What is a lymph node?", "zz " * 20]


def read(process):
    """Values by name, layer and expert."""
    with urllib.request.urlopen(f"http://127.0.0.1:{process.listening.metrics_port}/metrics") as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, sample.labels.get("layer"), sample.labels.get("expert")): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("model") == "generate"
    }


def test_the_experts_load_of_known_requests(tmp_path):
    triton_client("grpc")
    with triton(tmp_path, ("generate",)) as (process, _):
        num_tokens = 0
        for prompt in PROMPTS:
            body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
            told = process.ask("POST", "/v2/models/generate/generate", body)
            # The last token is written and not read.
            num_tokens += len(make_tokenizer()(prompt)["input_ids"]) + told["completion_tokens"] - 1
        ends = time.monotonic() + 15
        while True:
            found = read(process)
            routed = {
                layer: value for (name, layer, _), value in found.items() if name.endswith("routed_tokens_total")
            }
            if routed and all(num_tokens <= value <= num_tokens + PROBES for value in routed.values()):
                break
            assert time.monotonic() < ends, (routed, num_tokens)
            time.sleep(0.5)
        chosen = {layer: value for (name, layer, _), value in found.items() if name.endswith("chosen_experts_total")}
        for layer, total in chosen.items():
            loads = [
                v for (name, of, _), v in found.items() if name == "deepseek_moe_expert_tokens_total" and of == layer
            ]
            assert sum(loads) == total >= num_tokens
            assert found["deepseek_moe_experts_per_token", layer, None] == pytest.approx(total / routed[layer])
            assert found["deepseek_moe_router_entropy_mean_nats", layer, None] > 0
        assert len(chosen) >= 2
