"""Pages of latents: what they hold, prompts read in parts, evictions; other models keep their own pages."""

import asyncio

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from endpoint_server import SETTINGS, make_model

from deepseek_serving.openai_endpoint.engine import PAGE_SIZE, Engine, Limits
from deepseek_serving.openai_endpoint.sampling import RequestSampler, SamplingSettings

GREEDY = SamplingSettings(seed=0, temperature=0.0)


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def make_v2():
    torch.manual_seed(0)
    names = ("n_group", "topk_group", "norm_topk_prob")
    settings = {name: value for name, value in SETTINGS.items() if name not in names}
    config = DeepseekV2Config(**settings, initializer_range=0.2)
    return DeepseekV2ForCausalLM(config).eval()


def run(engine, prompts, num_tokens):
    async def one(ids):
        generation = engine.submit(ids, GREEDY, num_tokens)
        written = [token async for new in generation.tokens() for token in new]
        generation.close()
        return written

    async def together():
        return await asyncio.gather(*map(one, prompts))

    return asyncio.run(together())


MODELS = {"ours": lambda: make_model("ours"), "v3": lambda: make_model("stock"), "v2": make_v2, "llama": make_llama}


@pytest.mark.parametrize("name", MODELS)
def test_a_small_cache_and_prompts_in_parts_give_the_same_tokens(name):
    generator = torch.Generator().manual_seed(1)
    lengths = (1, 15, 16, 40, 90)
    prompts = [torch.randint(3, 259, (length,), generator=generator).tolist() for length in lengths]
    prompts.append([*prompts[-1][:64], 5, 6])  # shares four pages with the one before
    model = MODELS[name]()
    expected = [
        model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    # 128 tokens: two of the longer requests at a time, the others wait or are read again.
    with Engine(model, Limits(context=256, cache_tokens=128, max_running=2, max_batch_tokens=32)) as engine:
        assert run(engine, prompts, 12) == expected


def test_a_row_holds_the_latent_and_the_rotated_key():
    limits = Limits(context=256, cache_tokens=1024, max_running=4)
    with Engine(make_model("stock"), limits) as engine:
        cache = engine._manager.batch_processor.cache
        allocator = cache.cache_allocators["full_attention"]
        num_tokens = allocator.num_blocks * PAGE_SIZE
        row = (SETTINGS["kv_lora_rank"] + SETTINGS["qk_rope_head_dim"]) * torch.float32.itemsize
        assert cache.cache_tensor.numel() - 2 * cache.bytes_per_sector == num_tokens * 3 * row
        assert 1024 <= num_tokens <= 1024 + 4 * PAGE_SIZE + 2 * PAGE_SIZE


def test_the_sampler_draws_by_probability_and_seed():
    sampler = RequestSampler()
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(4000, 1)
    sampler._rows = [(SamplingSettings(seed=seed), 5) for seed in range(4000)]
    share = torch.bincount(sampler(logits, torch.empty(0)).argmax(-1), minlength=4) / 4000
    assert torch.allclose(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.03)  # four standard errors
    sampler._rows = [(SamplingSettings(seed=seed, top_p=0.6), 5) for seed in range(4000)]
    assert set(sampler(logits, torch.empty(0)).argmax(-1).tolist()) == {2, 3}
    sampler._rows = [(SamplingSettings(seed=seed, temperature=1e-12), 5) for seed in range(4000)]
    assert set(sampler(logits, torch.empty(0)).argmax(-1).tolist()) == {3}
