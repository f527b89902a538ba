"""A pretraining small enough for a test: 260-token vocabulary, 12 steps, on a few paragraphs.

Beside it a policy for the stages that begin with one. Makes ``ppo_parts`` importable too: pytest's importlib mode
leaves the test folders off the path.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from deepseek_training.text_data import load_texts
from deepseek_training.tokenizer import train_tokenizer
from modeling_deepseek import DeepseekConfig, DeepseekForCausalLM

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Thirty paragraphs of a book as the user's own JSON Lines file."""
    path = tmp_path_factory.mktemp("data") / "tales.jsonl"
    paragraphs = [text for text in load_texts("books")[2].split("\n\n") if len(text) > 200][:60]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    return path


@pytest.fixture(scope="session")
def tiny_settings(tiny_data):
    """Settings of a PretrainRecipe, as a recipe file would give them."""
    return {
        "data": str(tiny_data),
        "preset": "debug",
        "model": {"router_bias_update_speed": 0.01, "hidden_dropout": 0.1},  # state that a resumed run must restore
        "vocab_size": 300,
        "sequence_length": 32,
        "batch_size": 4,
        "max_steps": 12,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "logging_steps": 2,
        "save_steps": 4,
        "eval_steps": 4,
        "eval_bytes": 2000,
        "check_bigram": False,
        "report_to": [],
        "sample_prompts": ["The"],
        "sample_tokens": 5,
    }


@pytest.fixture(scope="session")
def policy_path(tmp_path_factory):
    """A debug-size model of ours with random weights, and its tokenizer."""
    path = tmp_path_factory.mktemp("policy")
    tokenizer = train_tokenizer(load_texts("dialogues", "validation"), 400)
    torch.manual_seed(0)
    DeepseekForCausalLM(DeepseekConfig.from_preset("debug", vocab_size=len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
