"""Words as the filters compare them, as 64-bit hashes, and hashes of word n-grams.

A Chinese or Japanese character is a word; any other word is a run of letters and digits, in lower case. Everything
else is left out, so that white space, case and punctuation do not hide a copy.
"""

import functools
import hashlib
import re

import numpy as np

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|[^\W_\u3040-\u30ff\u3400-\u9fff]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def words_of(text: str) -> list[str]:
    """Return a text's words in lower case.

    Args:
        text: The text.
    """
    return _WORD.findall(text.lower())


@functools.lru_cache(maxsize=1 << 18)
def _hash_word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def hash_words(words: list[str]) -> np.ndarray:
    """Return a hash of each word, uint64, equal in every process.

    Args:
        words: The words.
    """
    return np.fromiter(map(_hash_word, words), np.uint64, len(words))


def hash_ngrams(hashes: np.ndarray, n: int) -> np.ndarray:
    """Return a hash of each n-gram, uint64, in order.

    Args:
        hashes: Of the words.
        n: Words of an n-gram.
    """
    if len(hashes) < n:
        return np.zeros(0, np.uint64)
    count = len(hashes) - n + 1
    mixed: np.ndarray = np.zeros(count, np.uint64)
    for i in range(n):
        mixed = mixed * _FACTOR + hashes[i : i + count]
        mixed ^= mixed >> np.uint64(29)
    return mixed
