"""Held-out text that is also trained on: found by hash, and by word 5-grams where it differs in a few words.

`check_overlap` refuses it. The similarity is the exact Jaccard index of the sets of 5-grams of `duplicates`, not an
estimate: the held-out side is small enough for an index of all its 5-grams.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_training.data.cleaning.words import hash_ngrams, hash_words, words_of

NEAR_DUPLICATE = 0.6  # as in the `data` command
_SHINGLE = 5
_MOST_HELD_OUT = 5000


def check_overlap(held_out: Any, corpora: Sequence[Any], *, is_near: bool) -> None:
    """Refuse held-out text that a corpus trains on.

    Args:
        held_out: The corpus whose held-out documents are looked for.
        corpora: Whose training documents are looked through.
        is_near: Look for near-duplicates too, of at most 5,000 held-out documents, evenly spaced.

    Raises:
        ValueError: There is such a text; it is quoted.
    """
    index = _Index(held_out.validation) if is_near else None
    for corpus in corpora:
        for place in np.flatnonzero(np.isin(corpus.hashes[0], held_out.hashes[1])):
            _refuse(held_out, corpus, corpus.train[int(place)], "the same text")
        if index is None:
            continue
        for text in corpus.train:
            if index.is_near(text):
                _refuse(held_out, corpus, text, "a near-duplicate")


def shingles(text: str) -> np.ndarray:
    """Return the hashes of a text's word 5-grams, each once; of a shorter text that of all its words.

    Args:
        text: The text.
    """
    words = hash_words(words_of(text))
    return np.unique(hash_ngrams(words, min(_SHINGLE, max(1, len(words)))))


class _Index:
    """The 5-grams of held-out documents."""

    def __init__(self, texts: Sequence[str]) -> None:
        count = min(len(texts), _MOST_HELD_OUT)
        parts = [shingles(texts[int(place)]) for place in np.linspace(0, len(texts) - 1, count).round()]
        self._sizes = np.array(list(map(len, parts)))
        grams = np.concatenate(parts)
        order = np.argsort(grams, kind="stable")
        self._grams, self._owners = grams[order], np.repeat(np.arange(count), self._sizes)[order]

    def is_near(self, text: str) -> bool:
        """Return whether a held-out document has nearly the same 5-grams."""
        found = shingles(text)
        first = np.searchsorted(self._grams, found, side="left")
        counts = np.searchsorted(self._grams, found, side="right") - first
        if not counts.any():
            return False
        places = np.repeat(first - np.concatenate([[0], counts.cumsum()[:-1]]), counts) + np.arange(counts.sum())
        shared = np.bincount(self._owners[places], minlength=len(self._sizes))
        return bool((shared / (len(found) + self._sizes - shared) >= NEAR_DUPLICATE).any())


def _refuse(held_out: Any, corpus: Any, text: str, what: str) -> None:
    quoted = " ".join(text.split())
    where = held_out.settings.validation or held_out.source
    raise ValueError(
        f"validation: got {where}, which holds {what} as the training text of {corpus.source} "
        f"({quoted[:60]!r}), expected no overlap; run deepseek-moe data on both, or take it out"
    )
