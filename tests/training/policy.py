"""A policy to start from, as a fixture for the tests of several folders."""

import pytest
import torch

from deepseek_training.data.texts import load_texts
from deepseek_training.data.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory):
    """A debug-size model of ours with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 400)
    torch.manual_seed(0)
    DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
