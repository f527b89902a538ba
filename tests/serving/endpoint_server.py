"""Tiny models behind a real server on a free port of this machine, in a thread of the test's process."""

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tiny_models import TINY
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


def make_tokenizer():
    """Bytes as tokens, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<bos>", "<eos>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=template
    )


SETTINGS = TINY | {"vocab_size": 259, "max_position_embeddings": 256}


def make_model(kind: str):
    """Random weights, wide enough that greedy text does not repeat one token; in evaluation mode."""
    torch.manual_seed(0)
    if kind == "stock":
        model = DeepseekV3ForCausalLM(DeepseekV3Config(**SETTINGS, initializer_range=0.2))
    else:
        config = DeepseekConfig(**SETTINGS, initializer_range=0.2, min_experts_per_tok=1, expert_top_p=0.5)
        model = DeepseekForCausalLM(config)
    return model.eval()


@contextmanager
def serving(
    model, *, api_key=None, grace_s=5.0, requests_folder=None, tls=None, tokenizer=None, **limits
) -> Iterator["Running"]:
    """A server for the model, ended in order."""
    from deepseek_serving.listening import bind
    from deepseek_serving.openai_endpoint.app import Service
    from deepseek_serving.openai_endpoint.engine import Engine, Limits
    from deepseek_serving.openai_endpoint.server import Server

    limits = {"context": 256, "max_tokens": 200, "cache_tokens": 2048} | limits
    with bind("127.0.0.1", 0) as listener, Engine(model, Limits(**limits)) as engine:
        service = Service(engine, tokenizer or make_tokenizer(), "tiny", requests_folder)
        server = Server(service, api_key=api_key, grace_s=grace_s, tls=tls)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            yield Running(server, f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}", thread)
        finally:
            server.should_exit = True
            thread.join(30)
            service.close()
            assert not thread.is_alive()


class Running:
    """A server that runs: its address and its parts."""

    def __init__(self, server, url, thread):
        self.server, self.url, self.thread = server, url, thread
        self.service, self.engine = server.service, server.service.engine

    def value(self, name: str, **labels: str) -> float:
        """A metric's value now."""
        return self.service.metrics.registry.get_sample_value(f"deepseek_moe_{name}", labels) or 0.0


def wait_until(claim, seconds=10.0):
    """Wait for a claim to hold."""
    ends = time.monotonic() + seconds
    while not claim():
        assert time.monotonic() < ends, "not within the time"
        time.sleep(0.02)
