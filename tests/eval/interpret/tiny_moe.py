"""Tiny models of four families with routers whose choices differ by token, and passages to read."""

import numpy as np
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from deepseek_eval.interpret.passages import Passage
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM
from modeling_deepseek.families import find_moe_layers

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 0,
    "num_nextn_predict_layers": 0,
}
FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3", "ours")


def make_model(family: str) -> PreTrainedModel:
    """Weights wide enough that experts and routers matter."""
    torch.manual_seed(0)
    if family == "qwen3_moe":
        config = Qwen3MoeConfig(
            **_SIZES, moe_intermediate_size=16, num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, head_dim=16
        )
        model = Qwen3MoeForCausalLM(config)
    elif family == "mixtral":
        model = MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=6, num_experts_per_tok=2))
    elif family == "deepseek_v3":
        # Two groups of three: a masked expert is masked in its group's worth, too.
        model = DeepseekV3ForCausalLM(
            DeepseekV3Config(**{**_SIZES, **_LATENT, "n_group": 2, "num_experts_per_tok": 2})
        )
    else:
        model = DeepseekForCausalLM(DeepseekConfig(**_SIZES, **_LATENT, min_experts_per_tok=1, expert_top_p=0.7))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.5 if "embed" in name else 0.2)
    for layer in find_moe_layers(model):
        for parameter in layer.router.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_passages(number: int = 6, length: int = 17) -> list[Passage]:
    """Of two domains, whose tokens differ."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(*((3, 32), (32, 61))[row % 2], length) for row in range(number)]
    return [Passage("ab"[row % 2], row, np.array([1, *ids[row]])) for row in range(number)]


class Letters:
    """A tokenizer as far as the atlas needs one."""

    def decode(self, ids: list[int]) -> str:
        return " abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ01234567"[ids[0]]

    def convert_ids_to_tokens(self, token: int) -> str:
        return f"<{token}>"
