"""A mixture made of a dense model computes what the dense model does; the witness is transformers' own dense class."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from deepseek_training.compress.upcycle import spread_of_copies, upcycle, upcycled_config
from modeling_deepseek.families import find_moe_layers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DENSE = {
    "grouped queries, tied, scaled rope": LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3),
    "own head, wide heads, GELU": LlamaConfig(**SIZES, head_dim=16, hidden_act="gelu", rms_norm_eps=1e-3),
    "sliding window": MistralConfig(**SIZES, sliding_window=8),
    "query norm and biases": Qwen3Config(**SIZES, head_dim=8, attention_bias=True),
}


def make_dense(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def logits(model):
    with torch.no_grad():
        return model(torch.arange(80).view(2, 40)).logits


# Experts, of them per token, pieces: one copy in pieces, all of them, several copies, a width that 3 divides.
@pytest.mark.parametrize("numbers", [(8, 2, 1), (8, 2, 2), (4, 4, 4), (12, 6, 3), (5, 5, 1)])
@pytest.mark.parametrize("name", DENSE)
def test_the_mixture_computes_what_the_dense_model_does(name, numbers):
    dense = make_dense(DENSE[name])
    experts, chosen, pieces = numbers
    config = upcycled_config(dense.config, n_routed_experts=experts, num_experts_per_tok=chosen, granularity=pieces)
    sparse = upcycle(dense, config, router_std=0.5)
    layers = find_moe_layers(sparse)
    assert [layer.num_experts for layer in layers] == [experts, experts]
    for implementation in ("eager", "fused_moe"):
        sparse.set_experts_implementation(implementation)
        assert (logits(sparse) - logits(dense)).abs().max() < 1e-5 * logits(dense).abs().max()
    routers = [F.linear(torch.randn(64, 32), layer.router.weight).argmax(-1).unique() for layer in layers]
    assert all(len(found) > 1 for found in routers) or experts == pieces, "tokens go to several experts"


def test_the_mixture_survives_saving_and_shares_its_head(tmp_path):
    dense = make_dense(DENSE["grouped queries, tied, scaled rope"])
    sparse = upcycle(dense, upcycled_config(dense.config, n_routed_experts=4, num_experts_per_tok=2))
    sparse.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.rope_parameters == dense.config.rope_parameters
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(sparse))


def test_equal_experts_grow_apart_in_training():
    dense = make_dense(DENSE["own head, wide heads, GELU"])
    config = upcycled_config(dense.config, n_routed_experts=8, num_experts_per_tok=2, granularity=2)
    sparse = upcycle(dense, config, router_std=0.5).train()
    assert spread_of_copies(sparse, granularity=2) == 0
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    for step in range(3):
        ids = torch.randint(97, (2, 16), generator=torch.Generator().manual_seed(step))
        sparse(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert spread_of_copies(sparse, granularity=2) > 1e-4


def with_settings(base="grouped queries, tied, scaled rope", **settings):
    config = copy.deepcopy(DENSE[base])
    for name, value in settings.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize(
    ("config", "numbers", "expected"),
    [
        (Qwen2Config(**SIZES), {}, r"model: got type qwen2, expected a dense model of one of llama"),
        (with_settings(attention_bias=True), {}, r"model: got attention_bias=True, which mixtral does not have"),
        (with_settings(mlp_bias=True), {}, r"model: got mlp_bias=True, which mixtral"),
        (with_settings(quantization_config={"quant_method": "gguf"}), {}, r"model: got quantized weights"),
        (with_settings(), {"num_experts_per_tok": 9}, r"num_experts_per_tok: got 9, expected 1 to n_routed_experts=8"),
        (with_settings(), {"num_experts_per_tok": 0}, r"num_experts_per_tok: got 0"),
        (with_settings(), {"n_routed_experts": 1}, r"n_routed_experts: got 1, expected at least 2"),
        (with_settings(), {"granularity": 5}, r"granularity: got 5, expected a divisor of the .* 48"),
        (with_settings(), {"granularity": 0}, r"granularity: got 0"),
        (with_settings(), {"granularity": 3}, r"n_routed_experts: got 8, .* multiple of granularity=3"),
        (with_settings(), {"granularity": 4}, r"num_experts_per_tok: got 2, .* multiple of granularity=4"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_in_one_line(config, numbers, expected):
    with pytest.raises(ValueError, match=expected) as refused:
        upcycled_config(config, **{"n_routed_experts": 8, "num_experts_per_tok": 2, **numbers})
    assert "\n" not in str(refused.value)


def test_a_weight_without_a_place_is_refused():
    dense = make_dense(DENSE["sliding window"])
    config = upcycled_config(dense.config, n_routed_experts=4, num_experts_per_tok=2)
    dense.model.layers[1].self_attn.o_proj.bias = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(
        ValueError, match=r"got model\.layers\.1\.self_attn\.o_proj\.bias, which has no place in mixtral"
    ):
        upcycle(dense, config)
