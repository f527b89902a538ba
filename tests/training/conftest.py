"""A pretraining small enough for a test: 260-token vocabulary, 12 steps, on a few paragraphs."""

import json

import pytest
from policy import policy_path  # noqa: F401

from deepseek_training.data.texts import load_texts


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
