"""Tiny checkpoints of other people's families, under the names that their releases have; and what they compute."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Glm4MoeConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

IDS = torch.arange(3, 25).view(2, 11)
# Two layers of width 32; 4 experts of 2 used. Widths are such that 64 divides every expert's matrix.
BASE = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1}
FAMILIES = {
    "qwen3_moe": (Qwen3MoeConfig, {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 8}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "olmoe": (OlmoeConfig, {"num_experts": 4}),
    "glm4_moe": (Glm4MoeConfig, {**DEEPSEEK, "topk_group": 1, "head_dim": 8, "n_shared_experts": 1}),
    "deepseek_v3": (DeepseekV3Config, {
        **DEEPSEEK, "topk_group": 1, "n_shared_experts": 1, "q_lora_rank": None, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    }),
}  # fmt: skip


def save_base(name: str, path: object) -> None:
    """Write one, in bf16."""
    config_class, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**BASE, **settings}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(path)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits
