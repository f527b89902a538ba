"""A tiny model that sees and hears, as fixtures for the tests of several folders."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from deepseek_training.see_and_hear.encoders import load_audio, load_vision
from deepseek_training.see_and_hear.join import join
from modeling_deepseek import DeepseekConfig

TINY_VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_AUDIO = {**TINY_VISION, "time_stride": 45, "num_mel_bins": 16}
STOCK = {
    **{"vocab_size": 400, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128, "head_dim": 16},
}


FAMILIES = {
    "deepseek_v3": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1},
        **{"topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": None, "head_dim": 8},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 2},
    }
}


def text_model(family="deepseek_moe", **settings):
    """A debug-size model of ours, or a tiny one of another family, with its tokenizer."""
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 400)
    torch.manual_seed(0)
    if family == "deepseek_moe":
        config = DeepseekConfig.from_preset(
            "debug", vocab_size=len(tokenizer), router_bias_update_speed=0.01, **settings
        )
    else:
        config = AutoConfig.for_model(
            family, **{**STOCK, **FAMILIES.get(family, {}), "vocab_size": len(tokenizer), **settings}
        )
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def joined_model(family="deepseek_moe", *, sees=True, hears=True, **settings):
    """The same with tiny encoders."""
    model, tokenizer = text_model(family, **settings)
    return join(
        model,
        tokenizer,
        vision=load_vision("small", TINY_VISION) if sees else None,
        audio=load_audio("small", TINY_AUDIO) if hears else None,
        audio_seconds=1.0,
    )


@pytest.fixture(scope="session")
def multimodal_path(tmp_path_factory):
    """A saved one with random weights."""
    path = tmp_path_factory.mktemp("multimodal")
    joined = joined_model()
    joined.model.save_pretrained(path)
    joined.processor.save_pretrained(path)
    return path
