"""Counts of a served model's routers against an offline pass over the same tokens, integer by integer."""

import asyncio

import numpy as np
import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from endpoint_server import SETTINGS, make_model

from deepseek_serving.openai_endpoint.engine import Engine, Limits
from deepseek_serving.openai_endpoint.sampling import SamplingSettings
from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.router_output import read_choice


def make_mixtral():
    torch.manual_seed(0)
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    shape = {name: SETTINGS[name] for name in names}
    config = MixtralConfig(
        **shape, intermediate_size=16, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()


MODELS = {"ours": lambda: make_model("ours"), "stock": lambda: make_model("stock"), "mixtral": make_mixtral}


@torch.no_grad()
def count_offline(model, ids):
    """Each layer's load for one text, and the entropies' sum and the answer's log-probabilities."""
    seen = {}
    layers = find_moe_layers(model)
    handles = [
        layer.router.register_forward_hook(lambda _, __, output, number=number: seen.update({number: output}))
        for number, layer in enumerate(layers)
    ]
    logits = model(torch.tensor([ids])).logits[0]
    for handle in handles:
        handle.remove()
    choices = [read_choice(seen[number], layer.logits_place) for number, layer in enumerate(layers)]
    loads = np.concatenate(
        [choice.tokens_per_expert(None, layer.num_experts) for choice, layer in zip(choices, layers, strict=True)]
    )
    return loads, [choice.entropies().sum().item() for choice in choices], logits.log_softmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_counts_of_a_batch_are_those_of_each_text_alone(name):
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in (1, 5, 20, 33, 40, 70)]
    found = {}

    async def one(engine, number, ids):
        generation = engine.submit(ids, SamplingSettings(seed=number, temperature=float(number % 2)), 6)
        generation.take = lambda counts: found.update({number: counts})
        written = [token async for new in generation.tokens() for token in new]
        generation.close()
        return written

    async def together(engine):
        return await asyncio.gather(*(one(engine, number, ids) for number, ids in enumerate(prompts)))

    limits = Limits(context=256, cache_tokens=1024, max_running=3, max_batch_tokens=32)  # prompts in parts, some wait
    with Engine(model, limits) as engine:
        engine.keep_log_probs()
        written = asyncio.run(together(engine))
        engine.routing.flush()
        totals = engine.routing.totals
    sum_of_loads, entropies = 0, np.zeros(len(totals))
    for number, (ids, new) in enumerate(zip(prompts, written, strict=True)):
        passed = [*ids, *new][:-1]  # the last token is written and not read
        loads, entropy, log_probs = count_offline(model, passed)
        assert (found[number].expert_tokens == loads).all()
        told = sum(log_probs[place, token].item() for place, token in enumerate(new, start=len(ids) - 1))
        assert found[number].num_written == len(new)
        assert found[number].log_prob == pytest.approx(told, abs=1e-3)
        sum_of_loads = sum_of_loads + loads
        entropies += entropy
    assert (np.concatenate([layer.tokens_per_expert for layer in totals]) == sum_of_loads).all()
    assert [layer.entropy for layer in totals] == pytest.approx(entropies, rel=1e-4)
    num_passed = sum(len(ids) + len(new) - 1 for ids, new in zip(prompts, written, strict=True))
    assert {layer.num_tokens for layer in totals} == {num_passed}


def test_a_request_that_was_given_up_leaves_no_counts_of_its_own():
    async def give_up(engine):
        generation = engine.submit([5, 6, 7], SamplingSettings(0), 100)
        async for _ in generation.tokens():
            break
        generation.close()

    with Engine(make_model("ours"), Limits(context=256)) as engine:
        asyncio.run(give_up(engine))
        engine.routing.flush()
        assert not engine.routing._by_request
        assert engine.routing.totals[0].num_tokens >= 3  # it was computed, so the layers count it
