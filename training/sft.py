"""Encoding of conversations under its name of 0.1.0; it lives in ``deepseek_training.data.conversations``."""

from typing import Any

from deepseek_training.data.conversations import encode_conversation

__all__ = ["_encode"]


def _encode(row: dict[str, Any], tokenizer: Any, length: int) -> tuple[list[int], int]:
    """Return a conversation's ids and where its answer begins."""
    (encoded,) = encode_conversation(row, tokenizer, length)
    return encoded.input_ids, encoded.is_answer.index(True)
