"""A tokenizer that the model has no rows for is refused before anything is written."""

from pathlib import Path

import pytest

from deepseek_serving.gguf_tokenizer import write_tokenizer

FOLDER = Path(__file__).resolve().parents[1] / "eval/reference/ours"


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(ValueError, match=r"tokenizer: got token \d+, expected at most 4, the model's last row"):
        write_tokenizer(None, FOLDER, 5)
