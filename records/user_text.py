"""A user's text as token ids: text that spells a special token stays text.

Every stage, ``generate`` and chat evaluation encode through here, so that data can neither end a document nor open
another speaker's turn. Only a template's own special tokens become tokens. Text that spells none is encoded as the
tokenizer alone would.

transformers' `apply_chat_template(sanitize_control_tokens=True)` is not used: it also makes text of added tokens, such
as ``<think>`` in answers that are to be learned, and it cannot return a text.
"""

import functools
import re
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

# Private-use characters around what a user's text spells. One that the text itself holds is put between them, too.
_START, _END = "\U000f0000", "\U000f0001"
# Of each tokenizer its special tokens and what they were read from; large tokenizers take a millisecond to list them.
_KNOWN: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple[Any, ...], tuple[str, ...]]] = (
    weakref.WeakKeyDictionary()
)


def encode_documents_plainly(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return each text's ids, without begin and end tokens.

    Args:
        texts: Documents.
        tokenizer: Any.

    Raises:
        ValueError: The tokenizer makes a special token of plain text.
    """
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,  # documents are longer than the context by design
    )["input_ids"]
    spelled = _patterns(_special_tokens(tokenizer))[0]
    for text, ids in zip(texts, encoded, strict=True):
        if spelled.search(text):
            _refuse_special(ids, tokenizer)
    return encoded


def protect(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a user's text with marks around what spells a special token, for `encode`; mostly the text itself.

    Args:
        text: What a user wrote.
        tokenizer: The one that will encode it.
    """
    return _patterns(_special_tokens(tokenizer))[0].sub(f"{_START}\\g<0>{_END}", text)


def show(text: str) -> str:
    """Return a protected text without its marks."""
    return re.sub(f"{_START}(.*?){_END}", r"\1", text, flags=re.DOTALL) if _START in text else text


def encode(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool = False) -> list[int]:
    """Return the ids of a text in which the user's part is protected; special tokens outside of marks are tokens.

    Args:
        text: From `protect`, `render_chat`, or both put together.
        tokenizer: The same.
        add_special_tokens: Add the begin token, and whatever else the tokenizer adds to a text.

    Raises:
        ValueError: The tokenizer makes a special token of plain text.
    """
    if _START not in text:
        return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    ids: list[int] = []
    for previous, body, following in _split_at_tokens(text, _special_tokens(tokenizer)):
        # A tokenizer may take off the spaces beside a special token.
        body = body.lstrip() if previous in added and added[previous].rstrip else body
        body = body.rstrip() if following in added and added[following].lstrip else body
        if body:
            ids += _encode_segment(body, tokenizer, is_first=not ids)
        if following:
            ids.append(tokenizer.convert_tokens_to_ids(following))
    if not add_special_tokens:
        return ids
    before, after = _added_around(tokenizer)
    return [*before, *ids, *after]


def render_chat(
    messages: Iterable[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
) -> str:
    """Return a conversation as the tokenizer's chat template puts it, its contents protected.

    Args:
        messages: Each with ``role`` and ``content``.
        tokenizer: With a chat template.
        add_generation_prompt: Open the model's answer.
        continue_final_message: Leave the last message open, for the model to continue.

    Raises:
        ValueError: There is no template, or it refuses the conversation.
    """
    if tokenizer.chat_template is None:
        raise ValueError("chat_template: got none with the tokenizer, expected one; name a file with one")
    try:
        return tokenizer.apply_chat_template(
            [_protect_values(message, tokenizer) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    except Exception as error:  # a template is a program: it can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"chat_template: got one that refuses the conversation ({reason})") from None


def encode_chat(
    messages: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> list[int]:
    """Return a conversation's ids.

    Args:
        messages: As for `render_chat`.
        tokenizer: Likewise.
        add_generation_prompt: Likewise.

    Raises:
        ValueError: As for `render_chat` and `encode`.
    """
    return encode(render_chat(messages, tokenizer, add_generation_prompt=add_generation_prompt), tokenizer)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """All that the tokenizer calls special, longest first, without the unknown token: any odd sign gives that."""
    named = tuple(tokenizer.all_special_tokens)
    state, found = _KNOWN.get(tokenizer, ((), ()))
    if state != (len(tokenizer), *named):
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        found = tuple(sorted({*added, *named} - {tokenizer.unk_token, ""}, key=lambda token: (-len(token), token)))
        _KNOWN[tokenizer] = ((len(tokenizer), *named), found)
    return found


@functools.lru_cache(maxsize=64)
def _patterns(special_tokens: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What to mark, and a splitter into marked text and special tokens outside of marks."""
    tokens = "|".join(map(re.escape, special_tokens)) or "(?!)"
    marked = f"{tokens}|{_START}|{_END}"
    return re.compile(marked), re.compile(f"{_START}({marked}){_END}|({tokens})")


def _split_at_tokens(text: str, special_tokens: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(Special token before, plain text, special token after) of each stretch between special tokens."""
    stretches = []
    body, previous, position = "", "", 0
    for match in _patterns(special_tokens)[1].finditer(text):
        body += text[position : match.start()]
        position = match.end()
        if match[2] is None:
            body += match[1]
        else:
            stretches.append((previous, body, match[2]))
            body, previous = "", match[2]
    return [*stretches, (previous, body + text[position:], "")]


def _encode_segment(text: str, tokenizer: PreTrainedTokenizerBase, *, is_first: bool) -> list[int]:
    """Ids of plain text; behind a special token without the space that SentencePiece puts in front of a text."""

    def plain(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    ids = plain(text)
    if not is_first:
        newline, behind = plain("\n"), plain("\n" + text)
        if newline and behind[: len(newline)] == newline:
            ids = behind[len(newline) :]
    _refuse_special(ids, tokenizer)
    return ids


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    plain, whole = (tokenizer("a", add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True))
    start = next(n for n in range(len(whole)) if whole[n : n + len(plain)] == plain)
    return whole[:start], whole[start + len(plain) :]


def _refuse_special(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> None:
    special = set(tokenizer.convert_tokens_to_ids(list(_special_tokens(tokenizer))))
    found = next((number for number in ids if number in special), None)
    if found is not None:
        raise ValueError(
            f"tokenizer: got its special token {tokenizer.convert_ids_to_tokens(found)!r} for text that spells it, "
            "expected plain tokens; take that out of the text"
        )


def _protect_values(value: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    if isinstance(value, str):
        return protect(value, tokenizer)
    if isinstance(value, dict):
        return {key: _protect_values(inner, tokenizer) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_protect_values(inner, tokenizer) for inner in value]
    return value
