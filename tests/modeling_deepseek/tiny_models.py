"""Tiny DeepSeek-V3 models, as fixtures for the tests of several folders."""

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

# Odd on purpose: groups on, query latent on, one dense layer, head widths that differ. The expert width is a multiple
# of 8, which grouped_mm wants in bf16.
TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 44,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
    "max_position_embeddings": 128,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def tiny():
    """Settings of a model of 26k parameters; a copy."""
    return dict(TINY)


@pytest.fixture
def stock():
    """transformers' own model with random weights and a random balancing bias, in eval mode."""
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**TINY)).eval()
    for layer in model.model.layers[1:]:
        # Wider than the initial gate's scores spread, so that the bias decides some choices.
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
        torch.nn.init.normal_(layer.mlp.gate.weight, std=0.2)
    return model


@pytest.fixture
def input_ids():
    return torch.randint(3, 97, (2, 13), generator=torch.Generator().manual_seed(1))
