"""A model whose inputs cannot be attributed: refused in one line, or left out with one, never a stack of frames."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, Qwen3MoeConfig

from deepseek_eval.interpret.attributions import Reading

CONFIG = Qwen3MoeConfig(
    vocab_size=50, hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2,
)  # fmt: skip


def test_a_model_without_a_head_is_refused_in_one_line():
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG).eval()
    with pytest.raises(ValueError, match="--text: got Qwen3MoeModel, expected a language model that reads embeddings"):
        Reading(model, np.arange(4))
