"""Pairs of answers for preference learning: a prompt with a better and a worse answer, put by the chat template."""

import itertools
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepseek_records.document_files import is_messages
from deepseek_records.summary import DataUse
from deepseek_training.data.conversations import Message, encode_conversation
from deepseek_training.data.texts import UsedFor, describe_data, has_column, load_texts, read_rows
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.rewards.words import text_of

Pair = dict[str, list[Message]]


def load_pairs(recipe: DpoRecipe, split: str) -> list[Pair]:
    """Return the rows of one split as messages under ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        ValueError: A column is missing or holds something else, or no row is left.
    """
    has_prompt = has_column(recipe.data, recipe.prompt_column)
    column = recipe.prompt_column if has_prompt else recipe.chosen_column
    texts = set(load_texts(recipe.data, split, column=column, is_chat=True))
    pairs = []
    for row in read_rows(recipe.data, split, column=column, is_chat=True):
        if row["text"] not in texts:
            continue
        answers = [_messages(row, name, "assistant") for name in (recipe.chosen_column, recipe.rejected_column)]
        if has_prompt:
            asked = _messages(row, column, "user")
        else:
            same = itertools.takewhile(lambda two: two[0] == two[1], zip(*answers, strict=False))
            asked = [one for one, _ in same]
            answers = [answer[len(asked) :] for answer in answers]
        if not asked or not all(answers) or answers[0] == answers[1]:
            raise ValueError(f"data: got a pair without prompt or with equal answers in {recipe.data}, expected both")
        pairs.append({"prompt": asked, "chosen": answers[0], "rejected": answers[1]})
    return pairs


def _messages(row: dict[str, Any], column: str, role: str) -> list[Message]:
    value: Any = row.get(column)
    if is_messages(value):
        return list(value)
    if not isinstance(value, str):
        raise ValueError(f"data: got {type(value).__name__} in column '{column}', expected a text or messages")
    return [{"role": role, "content": value}]


def encode_pair(pair: Pair, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, list[int]]:
    """Return ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, as TRL's collator takes them.

    Args:
        pair: From `load_pairs`.
        tokenizer: With its chat template.
        length: Tokens beyond are cut off.

    Raises:
        ValueError: The template refuses it, or the prompt leaves no room for an answer.
    """
    encoded: dict[str, list[int]] = {}
    for name in ("chosen", "rejected"):
        whole = encode_conversation({"messages": pair["prompt"] + pair[name]}, tokenizer, length)[-1]
        end = max(number for number, own in enumerate(whole.is_answer) if own) + 1
        start = next((number + 1 for number in reversed(range(end)) if not whole.is_answer[number]), 0)
        encoded["prompt_ids"] = whole.input_ids[:start]
        encoded[f"{name}_ids"] = whole.input_ids[start:end]
    return encoded


def describe_pairs(recipe: DpoRecipe, split: str, pairs: Sequence[Pair], used_for: UsedFor) -> DataUse:
    """Return the summary's line on the pairs of one split."""
    texts = ["".join(text_of([message]) for part in pair.values() for message in part) for pair in pairs]
    return describe_data(recipe.data, split, texts, used_for)
