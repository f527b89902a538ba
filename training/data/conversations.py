"""Conversations for fine-tuning: rows of a question and an answer, or of ``messages``, put by the chat template.

Which tokens are the model's own is found by comparing: what the template writes with the answer, with another one in
its place, and with the generation prompt instead. A length alone is wrong where the generation prompt is not the start
of the answer's turn, as with DeepSeek-R1's, which opens ``<think>`` only to generate.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from deepseek_records.document_files import is_messages
from deepseek_records.summary import DataUse
from deepseek_records.user_text import encode, render_chat, show
from deepseek_training.data.texts import UsedFor, describe_data, has_column, load_texts, read_rows
from deepseek_training.recipes.dpo import DpoRecipe
from deepseek_training.recipes.sft import SftRecipe
from deepseek_training.rewards.words import text_of

Message = dict[str, Any]
_STAND_IN = "\ue000"  # a private-use character, put where the answer stands


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """A conversation's tokens.

    Attributes:
        input_ids: All of them.
        is_answer: Whether a token is the model's own: trained, and scored.
    """

    input_ids: list[int]
    is_answer: list[bool]

    @property
    def labels(self) -> list[int]:
        """The ids of the model's own tokens, -100 elsewhere."""
        return [number if own else -100 for number, own in zip(self.input_ids, self.is_answer, strict=True)]


def load_conversations(recipe: SftRecipe, split: str) -> list[dict[str, Any]]:
    """Return the rows of one split with ``messages``, or with ``prompt`` and ``answer``.

    Raises:
        ValueError: A column is missing, or no row is left.
    """
    has_messages = has_column(recipe.data, recipe.messages_column)
    column = recipe.messages_column if has_messages else recipe.prompt_column
    texts = set(load_texts(recipe.data, split, column=column, is_chat=has_messages))
    rows: list[dict[str, Any]] = []
    for row in read_rows(recipe.data, split, column=column, is_chat=has_messages):
        if row["text"] not in texts or (recipe.sources and row.get("source") not in recipe.sources):
            continue
        if has_messages:
            if not is_messages(row[column]):
                raise ValueError(f"messages_column: got {row['text'][:40]!r} in {recipe.data}, expected messages")
            rows.append({"messages": row[column]})
            continue
        if not isinstance(row.get(recipe.answer_column), str):
            raise ValueError(f"answer_column={recipe.answer_column!r}: {recipe.data} has a row without such a text")
        rows.append({"prompt": row["text"], "answer": row[recipe.answer_column]})
    if not rows:
        raise ValueError(f"sources={recipe.sources}: {recipe.data} has no {split} row from them")
    return rows


def describe_conversations(
    recipe: SftRecipe, split: str, rows: Sequence[dict[str, Any]], used_for: UsedFor
) -> DataUse:
    """Return the summary's line on the conversations of one split."""
    return describe_data(
        recipe.data, split, ["".join(text_of([one]) for one in to_messages(row)) for row in rows], used_for
    )


def read_template(recipe: SftRecipe | DpoRecipe, tokenizer: Any) -> str:
    """Return the recipe's chat template, or the tokenizer's.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Neither the recipe nor the tokenizer has one, or the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: got one without end token, expected one; no answer could end")
    if recipe.chat_template is not None:
        if not Path(recipe.chat_template).is_file():
            raise FileNotFoundError(f"chat_template: no file {recipe.chat_template}")
        return _parsed(Path(recipe.chat_template))
    if tokenizer.chat_template is None:
        raise ValueError("chat_template=null: the tokenizer has none; name a file with one")
    return tokenizer.chat_template


def _parsed(path: Path) -> str:
    """The template in a file, after a look at its syntax; what it does is seen when it is first used."""
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = path.read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except UnicodeDecodeError:
        raise ValueError(f"chat_template: {path}: got bytes that are not UTF-8, expected text") from None
    except TemplateSyntaxError as error:
        # jinja2 alone does not know transformers' tag {% generation %}.
        if "generation" not in str(error):
            raise ValueError(f"chat_template: {path}, line {error.lineno}: {error.message}") from None
    return text


def to_messages(row: dict[str, Any]) -> list[Message]:
    """Return a row's conversation: its ``messages``, or the user's ``prompt`` and the ``answer`` if there is one."""
    if "messages" in row:
        return list(row["messages"])
    asked = [{"role": "user", "content": row["prompt"]}]
    return [*asked, {"role": "assistant", "content": row["answer"]}] if "answer" in row else asked


def question_of(row: dict[str, Any]) -> list[Message]:
    """Return a row's conversation up to its last question, which the model has to answer."""
    messages = to_messages(row)
    answered = [number for number, message in enumerate(messages) if message.get("role") == "assistant"]
    return messages[: answered[-1]] if answered and answered[-1] > 0 else messages


def encode_conversation(
    row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[EncodedConversation]:
    """Return a conversation's tokens, at most `length` of them, with all turns of the model marked.

    A template that writes an earlier turn otherwise once another follows (Qwen3's leaves out what was thought) gives
    one example per turn of the model, each as the model is asked for it.

    Args:
        row: With ``messages``, or with ``prompt`` and ``answer``.
        tokenizer: With its chat template.
        length: Tokens beyond are cut off.

    Raises:
        ValueError: The template refuses the conversation or opens the model's turn otherwise than it generates, there
            is not a turn of the model, or the question leaves no room for an answer.
    """
    messages = to_messages(row)
    turns = [
        _Turn.of(messages[: number + 1], tokenizer)
        for number, message in enumerate(messages)
        if message.get("role") == "assistant"
    ]
    if not turns:
        raise ValueError(f"messages: got a conversation without a turn of the assistant ({_begin(messages)})")
    ids = [encode(turn.text, tokenizer) for turn in turns]
    if all(later.text.startswith(turn.text) for turn, later in itertools.pairwise(turns)):
        spans = [_span(turn, own, ids[-1], tokenizer) for turn, own in zip(turns, ids, strict=True)]
        examples = [_mark(ids[-1], spans)]
    else:
        examples = [_mark(own, [_span(turn, own, own, tokenizer)]) for turn, own in zip(turns, ids, strict=True)]
    cut = [EncodedConversation(one.input_ids[:length], one.is_answer[:length]) for one in examples]
    for whole, part in zip(examples, cut, strict=True):
        if not any(part.is_answer):
            raise ValueError(
                f"sequence_length={length}: the question of {whole.is_answer.index(True)} tokens ({_begin(messages)}) "
                "leaves no room for an answer"
            )
    return cut


@dataclasses.dataclass(frozen=True)
class _Turn:
    """A conversation up to one turn of the model.

    Attributes:
        text: As the template puts it, protected.
        given: How much of it the model is given before it answers.
    """

    text: str
    given: int

    @classmethod
    def of(cls, messages: list[Message], tokenizer: PreTrainedTokenizerBase) -> "_Turn":
        """Render the conversation, and compare."""
        *before, answer = messages
        text = render_chat(messages, tokenizer)
        asked = render_chat(before, tokenizer, add_generation_prompt=True) if before else ""
        if before and text.startswith(asked):
            return cls(text, len(asked))
        other = _STAND_IN if isinstance(answer.get("content"), str) else [{"type": "text", "text": _STAND_IN}]
        begin = _common(text, render_chat([*before, {**answer, "content": other}], tokenizer))
        common = _common(text, asked)
        unopened = _common(render_chat(before, tokenizer), asked) if before else 0
        if common < unopened or not before:  # an earlier turn is written otherwise once this one follows
            return cls(text, begin)
        if common == unopened < len(asked):
            raise ValueError(
                f"chat_template: got {show(asked[unopened:])!r} as generation prompt, expected the start of the "
                f"assistant's turn, {show(text[unopened:begin])!r}"
            )
        return cls(text, min(common, begin))


def _span(turn: _Turn, own: list[int], whole: list[int], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """First and last + 1 of a turn's tokens in the whole conversation's."""
    given = encode(turn.text[: turn.given], tokenizer) if turn.given else []
    return _common(given, whole), len(whole) if own == whole else _common(own, whole)


def _mark(ids: list[int], spans: Iterable[tuple[int, int]]) -> EncodedConversation:
    is_answer = [False] * len(ids)
    for first, end in spans:
        is_answer[first:end] = [True] * (end - first)
    return EncodedConversation(ids, is_answer)


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many first items are equal."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _begin(messages: list[Message]) -> str:
    return f"{str(messages[0].get('content'))[:40]!r}..." if messages else "no message"
