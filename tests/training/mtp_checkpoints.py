"""Tiny checkpoints of stock models with their prediction layers, under the names of the released ones."""

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TINY
from transformers import DeepseekV3Config, Glm4MoeConfig, Glm4MoeForCausalLM

from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip


KINDS = ["full_attention", "sliding_attention"]


def write_v3(path, depths, **changes):
    """A checkpoint of DeepSeek-V3 with its prediction layers, which our class writes under the official names."""
    torch.manual_seed(0)
    settings = {**TINY, **changes, "num_nextn_predict_layers": depths}
    model = DeepseekForCausalLM(DeepseekConfig(**settings, mtp_loss_coef=0.3))
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(0, 0.1)
    model.save_pretrained(path)
    config = DeepseekV3Config(**settings)
    config.architectures = ["DeepseekV3ForCausalLM"]
    config.save_pretrained(path)
    return path


def write_glm(path, **settings):
    """GLM-4-MoE, whose prediction layer's names are those of the layers before it and a few more."""
    config = Glm4MoeConfig(**{**SMALL, **settings}, n_routed_experts=4, first_k_dense_replace=1)
    torch.manual_seed(0)
    Glm4MoeForCausalLM(config).save_pretrained(path)
    own = load_file(path / "model.safetensors")
    layer = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in own.items() if ".layers.1." in name}
    norms = {f"model.layers.2.{name}.weight": torch.ones(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    drafts = {**layer, **norms, "model.layers.2.eh_proj.weight": torch.randn(32, 64) * 0.1}
    save_file({**own, **drafts}, path / "model.safetensors", {"format": "pt"})
    return sorted(drafts)


def write_mellum(path):
    """Mellum, whose prediction layer lies under ``mtp.`` and sees a window only."""
    config = transformers.MellumConfig(
        **SMALL, num_local_experts=4, num_mtp_layers=1, sliding_window=5, layer_types=KINDS
    )
    torch.manual_seed(0)
    transformers.MellumForCausalLM(config).save_pretrained(path)
    own = load_file(path / "model.safetensors")
    layer = {n.replace("model.layers.1.", "mtp.layers.0."): t.clone() for n, t in own.items() if ".layers.1." in n}
    norms = {f"mtp.{n}.weight": torch.ones(32) for n in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")}
    drafts = {**layer, **norms, "mtp.fc.weight": torch.randn(32, 64) * 0.1}
    save_file({**own, **drafts}, path / "model.safetensors", {"format": "pt"})
    return sorted(drafts)
