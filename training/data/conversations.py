"""Conversations for fine-tuning: a question and its answer per row, put by the tokenizer's chat template."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_records.summary import DataUse
from deepseek_training.data.texts import UsedFor, describe_data, load_texts, read_rows
from deepseek_training.recipes.sft import SftRecipe


def load_conversations(recipe: SftRecipe, split: str) -> list[dict[str, str]]:
    """Return the rows of one split with ``prompt`` and ``answer``.

    Raises:
        ValueError: A column is missing, or no row is left.
    """
    texts = set(load_texts(recipe.data, split, column=recipe.prompt_column))
    rows = []
    for row in read_rows(recipe.data, split, column=recipe.prompt_column):
        if row["text"] not in texts or (recipe.sources and row.get("source") not in recipe.sources):
            continue
        if not isinstance(row.get(recipe.answer_column), str):
            raise ValueError(f"answer_column={recipe.answer_column!r}: {recipe.data} has a row without such a text")
        rows.append({"prompt": row["text"], "answer": row[recipe.answer_column]})
    if not rows:
        raise ValueError(f"sources={recipe.sources}: {recipe.data} has no {split} row from them")
    return rows


def describe_conversations(
    recipe: SftRecipe, split: str, rows: Sequence[dict[str, str]], used_for: UsedFor
) -> DataUse:
    """Return the summary's line on the conversations of one split."""
    return describe_data(recipe.data, split, [f"{row['prompt']}{row['answer']}" for row in rows], used_for)


def read_template(recipe: SftRecipe, tokenizer: Any) -> str:
    """Return the recipe's chat template, or the tokenizer's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Neither the recipe nor the tokenizer has one.
    """
    if recipe.chat_template is not None:
        if not Path(recipe.chat_template).is_file():
            raise FileNotFoundError(f"chat_template: no file {recipe.chat_template}")
        return Path(recipe.chat_template).read_text(encoding="utf-8")
    if tokenizer.chat_template is None:
        raise ValueError("chat_template=null: the tokenizer has none; name a file with one")
    return tokenizer.chat_template


def to_messages(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    """Return a conversation as TRL reads it: the loss is taken on the completion only."""
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["answer"]}],
    }


def encode_conversation(row: dict[str, str], tokenizer: Any, length: int) -> tuple[list[int], int]:
    """Return a conversation's tokens, at most `length` of them, and where its answer begins.

    Raises:
        ValueError: The question leaves no room for an answer.
    """
    both = to_messages(row)
    asked = tokenizer.apply_chat_template(both["prompt"], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(both["prompt"] + both["completion"], return_dict=False)[:length]
    if len(asked) >= len(whole):
        raise ValueError(
            f"sequence_length={length}: the question of {len(asked)} tokens ({row['prompt'][:40]!r}...) leaves no "
            "room for an answer"
        )
    return whole, len(asked)
