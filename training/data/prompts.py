"""Prompts for reinforcement learning: read, kept by their source, put by a template and encoded."""

import datasets
from transformers import PreTrainedTokenizerBase

from deepseek_records.user_text import encode, encode_chat, protect
from deepseek_training.data.conversations import Message
from deepseek_training.data.texts import load_texts, read_rows
from deepseek_training.recipes.align import AlignRecipe


def load_prompts(recipe: AlignRecipe, tokenizer: PreTrainedTokenizerBase, split: str) -> datasets.Dataset:
    """Return the prompts of one split with ``prompt`` and ``input_ids``, in order of appearance.

    Raises:
        ValueError: No prompts, or one longer than `max_prompt_tokens`.
    """
    texts = load_texts(recipe.prompts, split, column=recipe.prompt_column)
    if recipe.prompt_sources:
        rows = read_rows(recipe.prompts, column=recipe.prompt_column)
        wanted = {row["text"] for row in rows if row.get("source") in recipe.prompt_sources}
        texts = [text for text in texts if text in wanted]
    if not texts:
        raise ValueError(f"prompt_sources={recipe.prompt_sources}: {recipe.prompts} has no {split} row from them")
    ids = [encode_prompt(text, tokenizer, recipe.prompt_template) for text in texts]
    longest = max(range(len(ids)), key=lambda i: len(ids[i]))
    if len(ids[longest]) > recipe.max_prompt_tokens:
        raise ValueError(
            f"prompts: {recipe.prompts} holds a prompt of {len(ids[longest])} tokens ({texts[longest][:40]!r}...), "
            f"longer than max_prompt_tokens={recipe.max_prompt_tokens}"
        )
    return datasets.Dataset.from_dict({"prompt": texts, "input_ids": ids})


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
