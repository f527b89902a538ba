"""Prompts for reinforcement learning: read, kept by their source, put by a template and encoded."""

import json
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from deepseek_records.document_files import is_messages
from deepseek_records.user_text import encode, encode_chat, protect
from deepseek_training.data.conversations import Message, question_of
from deepseek_training.data.texts import has_column, load_texts, read_rows
from deepseek_training.recipes.rewarded import RewardedSettings
from deepseek_training.rewards.words import text_of


def load_prompts(recipe: RewardedSettings, tokenizer: PreTrainedTokenizerBase, split: str) -> datasets.Dataset:
    """Return the prompts of one split with ``prompt`` and ``input_ids``, in order of appearance.

    A conversation is a prompt up to its last question; what the assistant said last is left out. Where one prompt is a
    conversation, all become one, put by the chat template.

    Raises:
        ValueError: No prompts, or one longer than `max_prompt_tokens`.
    """
    column = recipe.prompt_column
    if column is None and not any(has_column(recipe.prompts, name) for name in ("text", "prompt")):
        column = "messages" if has_column(recipe.prompts, "messages") else None
    texts = load_texts(recipe.prompts, split, column=column, is_chat=True)
    rows = list(read_rows(recipe.prompts, column=column, is_chat=True))
    if recipe.prompt_sources:
        wanted = {row["text"] for row in rows if row.get("source") in recipe.prompt_sources}
        texts = [text for text in texts if text in wanted]
    if not texts:
        raise ValueError(f"prompt_sources={recipe.prompt_sources}: {recipe.prompts} has no {split} row from them")
    chats = {row["text"] for row in rows if is_messages(row.get(column or "prompt"))}
    prompts: list[Any] = texts
    if any(text in chats for text in texts):
        prompts = [_question(text) if text in chats else [{"role": "user", "content": text}] for text in texts]
    ids = [encode_prompt(prompt, tokenizer, recipe.prompt_template) for prompt in prompts]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > recipe.max_prompt_tokens:
        raise ValueError(
            f"prompts: {recipe.prompts} holds a prompt of {len(ids[longest])} tokens ({texts[longest][:40]!r}...), "
            f"longer than max_prompt_tokens={recipe.max_prompt_tokens}"
        )
    return datasets.Dataset.from_dict({"prompt": prompts, "input_ids": ids})


def _question(text: str) -> list[Message]:
    """The conversation up to what the model has to answer, with equal keys in each message, as a column needs."""
    asked = question_of({"messages": json.loads(text)})
    return [{"role": message["role"], "content": text_of([message])} for message in asked]


def prompt_texts(prompts: datasets.Dataset) -> list[str]:
    """Return what each prompt asks: the text, or the last message of a conversation."""
    return [text_of(prompt) for prompt in prompts["prompt"]]


def check_enough(recipe: RewardedSettings, prompts: datasets.Dataset, num_processes: int) -> None:
    """Raise a one-line ValueError unless there are prompts for a batch in each process."""
    if len(prompts) < recipe.batch_size * num_processes:
        raise ValueError(
            f"batch_size={recipe.batch_size}: {recipe.prompts} has only {len(prompts)} prompts to train on, "
            f"for {num_processes} process(es)"
        )


def encode_prompt(prompt: str | list[Message], tokenizer: PreTrainedTokenizerBase, template: str | None) -> list[int]:
    """Return a prompt's token ids, put as the template says; None takes the tokenizer's chat template.

    Raises:
        ValueError: No template is given and the tokenizer has none, or it refuses the prompt.
    """
    if template is not None and isinstance(prompt, str):
        start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        return start + encode(template.replace("{prompt}", protect(prompt, tokenizer)), tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError("prompt_template=null: the tokenizer has no chat template; give one such as '{prompt}\\n'")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return encode_chat(messages, tokenizer, add_generation_prompt=True)
