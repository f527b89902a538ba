"""What the model is shown: raw text (``base``) or the tokenizer's chat template (``chat``); and a record of it.

Called by ``harness.py`` and ``samples_reader.py``. A chat prompt is rendered to text here, so that nothing behind this
file knows of chats. As in lm-evaluation-harness 0.4.13 the last message is the opening of the model's own answer,
which it continues; of a multiple-choice question it is the question, and each letter is an answer.
"""

import dataclasses
import gzip
import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepseek_eval.tasks.task import ChoiceItem, CompletionItem, ProgramItem, Task
from deepseek_records.run_folder import RunFolder
from deepseek_records.user_text import render_chat, show

STYLES = ("base", "chat")
_CHOICE_KINDS = ("choice", "continuation")


def check_style(style: str, tasks: Sequence[Task]) -> None:
    """Refuse a style that is unknown or that a task does not have.

    Args:
        style: ``base`` or ``chat``.
        tasks: What is about to be run.

    Raises:
        ValueError: The style does not fit.
    """
    if style not in STYLES:
        raise ValueError(f"prompt_style: got {style!r}, expected {' or '.join(STYLES)}")
    without = [task.name for task in tasks if task.kind in (*_CHOICE_KINDS, "text", "media") and not task.has_chat]
    if style == "chat" and without:
        raise ValueError(f"prompt_style = chat: task {without[0]} has base only")


def apply_style(
    style: str, items: Sequence[ProgramItem], tokenizer: PreTrainedTokenizerBase, source: str
) -> list[ProgramItem]:
    """Return the items with the prompt, protected where it is a chat's, and the stop strings of a style.

    Args:
        style: ``base`` or ``chat``.
        items: The problems.
        tokenizer: Whose chat template is used.
        source: The model's name, for errors.

    Raises:
        ValueError: The tokenizer has no chat template, or its template refuses the messages.
    """
    if style == "base":
        return list(items)
    _check_template(tokenizer, source)
    return [dataclasses.replace(item, prompt=_render(item, tokenizer, source), stop=item.chat.stop) for item in items]


def _render(item: ProgramItem, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    try:
        return render_chat(item.chat.messages, tokenizer, continue_final_message=True)
    except ValueError as error:
        reason = str(error).removeprefix("chat_template: ")
        raise ValueError(f"prompt_style = chat: the chat template of {source} refuses {item.id} ({reason})") from None


def apply_chat(
    items: Sequence[ChoiceItem | CompletionItem], tokenizer: PreTrainedTokenizerBase, source: str
) -> list[Any]:
    """Return questions put as the user's turn, with answers that begin the model's, as lm-eval's chat template does.

    Args:
        items: The questions.
        tokenizer: Whose chat template is used.
        source: The model's name, for errors.

    Raises:
        ValueError: The tokenizer has no chat template, or its template refuses the questions.
    """
    _check_template(tokenizer, source)
    return [_put_as_turn(item, tokenizer, source) for item in items]


def _put_as_turn(
    item: ChoiceItem | CompletionItem, tokenizer: PreTrainedTokenizerBase, source: str
) -> ChoiceItem | CompletionItem:
    prompt = _render_question(item, tokenizer, source)
    if isinstance(item, CompletionItem):
        return dataclasses.replace(item, prompt=prompt, context="")
    choices = tuple(choice.removeprefix(" ") for choice in item.choices)
    return dataclasses.replace(item, prompt=prompt, choices=choices, context="", shorter_prompts=())


def _render_question(item: ChoiceItem | CompletionItem, tokenizer: PreTrainedTokenizerBase, source: str) -> str:
    question = item.prompt if item.chat_context is None else item.prompt.removeprefix(item.context)
    turns = [*(item.chat_context or ()), {"role": "user", "content": question}]
    try:
        return render_chat(turns, tokenizer, add_generation_prompt=True)
    except ValueError:
        pass  # as lm-eval: a template that refuses a system's turn gets the others
    try:
        turns = [turn for turn in turns if turn["role"] != "system"]
        return render_chat(turns, tokenizer, add_generation_prompt=True)
    except ValueError as error:
        reason = str(error).removeprefix("chat_template: ")
        raise ValueError(f"prompt_style = chat: the chat template of {source} refuses {item.id} ({reason})") from None


def _check_template(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    if not tokenizer.chat_template:
        raise ValueError(f"prompt_style = chat: the tokenizer of {source} has no chat template; use base")


def take_code(style: str, item: ProgramItem, text: str) -> str:
    """Return the completion that an answer holds.

    Args:
        style: ``base`` or ``chat``.
        item: The problem.
        text: What the model wrote, already cut at a stop string.
    """
    return text if style == "base" else item.chat.extract(text)


def write_prompts(run: RunFolder, task: Task, items: Sequence[Any]) -> None:
    """Write what the model was shown, item by item, for the report's browser and for whoever checks the format.

    Args:
        run: The run folder.
        task: The task.
        items: Its items, styled.
    """
    path = run.path / f"prompts_{task.name}.jsonl.gz"
    temporary = path.with_name(path.name + ".partial")
    with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=6) as file:
        for item in items:
            row = {"id": item.id, "prompt": show(item.prompt)}
            if task.kind in _CHOICE_KINDS:
                row["choices"] = item.choices
                if item.answers is not None:
                    row["answers"] = item.answers
            file.write(json.dumps(row) + "\n")
    temporary.rename(path)
