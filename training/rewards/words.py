"""Words and n-grams, as the rewards count them.

Chat messages (``[{"role": ..., "content": ...}]``, what GRPO and RLOO pass for conversational data) are read as the
text of their last message, so each reward takes plain strings and conversations alike. Chinese puts
no space between words: its function words are words, and what stands between them is cut into pairs of characters.
"""

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import snowballstemmer

from deepseek_training.rewards.function_words import FUNCTION_WORDS
from deepseek_training.rewards.scripts import UNSPACED, cut_unspaced

# Vowel signs and accents that are characters by themselves (Hindi, decomposed Latin) belong to their word; `\w` lacks
# them.
_MARKS = "".join(chr(i) for i in range(0x300, 0x10000) if unicodedata.category(chr(i)).startswith("M"))
_LETTER, _NO_DIGIT = rf"[^\W_{UNSPACED}]", r"[^\W\d_]"
_ENDING = rf"['\u2019]{_NO_DIGIT}+(?:[{_MARKS}]+{_NO_DIGIT}*)*"  # 's, 't
_WORD = re.compile(rf"{_LETTER}+(?:[{_MARKS}]+{_LETTER}*)*(?:{_ENDING})*|(?P<unspaced>[{UNSPACED}]+)")
_STEMMER = snowballstemmer.stemmer("english")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f\uff1b])|\n+")
_COLON = re.compile(r"(?<=:)\s+|(?<=\uff1a)")


def text_of(item: str | Sequence[dict[str, Any]]) -> str:
    """Return a prompt's or completion's text, be it a string or chat messages.

    Args:
        item: A string, or messages; a message's content is a string, None or missing (a bare tool call) for no text,
            or parts like ``{"type": "text", "text": ...}``, of which those without text (images) are passed over.
    """
    if isinstance(item, str):
        return item
    content = item[-1].get("content") if item else None
    if content is None or isinstance(content, str):
        return content or ""
    return " ".join(part["text"] for part in content if part.get("type") == "text")


def split_sentences(text: str, *, at_colons: bool = False) -> list[str]:
    """Return a text's sentences, English or Chinese; a line's end ends one.

    Args:
        text: The text.
        at_colons: Also end one at a colon, as between a request and the text it is about.
    """
    sentences = _SENTENCE_END.split(text)
    return [part for sentence in sentences for part in _COLON.split(sentence)] if at_colons else sentences


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text, without punctuation."""
    return [word for word, _, _ in find_words(text)]


def find_words(text: str) -> list[tuple[str, int, int]]:
    """Return the words as `split_words` does, each with where it begins and ends in the text."""
    found = []
    for match in _WORD.finditer(text):
        if match["unspaced"]:
            found += [(w, match.start() + i, match.start() + j) for w, i, j in cut_unspaced(match["unspaced"])]
        else:
            found.append((match.group().lower().replace("\u2019", "'"), match.start(), match.end()))
    return found


def content_words(words: Iterable[str]) -> list[str]:
    """Return the words that are not function words, each cut to its stem."""
    return [stem(word) for word in words if word not in FUNCTION_WORDS]


@functools.lru_cache(maxsize=65_536)
def stem(word: str) -> str:
    """Return the word without its ending, by Snowball's English stemmer: "diseases" and "disease" are one."""
    stemmed: str = _STEMMER.stemWord(word)
    return stemmed


def has_form_of(word: str, others: Iterable[str]) -> bool:
    """Return whether a word may be another form of one of the others.

    Forms share all letters but the last of the shorter one, three at least, and differ by three letters in length at
    most. That catches what a stemmer misses ("ugly" and "uglies", "disparity" and "disparitie"), and some strangers
    ("hear" and "heart").

    Args:
        word: A word, not cut to its stem.
        others: Words.
    """
    return any(
        abs(len(word) - len(other)) <= 3 and word[:shared] == other[:shared] and min(len(word), len(other)) >= 3
        for other in others
        for shared in [max(3, min(len(word), len(other)) - 1)]
    )


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a word list, in order."""
    return list(zip(*(words[i:] for i in range(n)), strict=False))
