"""A small n-gram language model over characters or words, for telling text from noise.

    p_n(x | h) = (count(h x) + T(h) * p_{n-1}(x | h')) / (count(h) + T(h))

with T(h) the number of different symbols seen behind the history h, h' the history without its first symbol, and p_0
uniform. Counts are hashed into buckets, so that the model's size does not depend on the text.

Reference: Witten and Bell, 1991, "The zero-frequency problem", method C.
"""

from collections.abc import Iterable

import numpy as np

from deepseek_training.data.cleaning.words import hash_ngrams

_BUCKETS = 1 << 20
_ALPHABET = 1 << 12


class NgramModel:
    """Counts of n-grams up to an order.

    Args:
        order: Longest n-gram.
        sequences: What is counted: 64-bit symbols each.
    """

    def __init__(self, order: int, sequences: Iterable[np.ndarray]) -> None:
        self.order = order
        self.counts: np.ndarray = np.zeros((order, _BUCKETS), np.uint32)
        self.followers: np.ndarray = np.zeros((order, _BUCKETS), np.uint32)
        kept = list(sequences)
        self.total = sum(map(len, kept))
        self.num_symbols = 0
        for n in range(1, order + 1):
            grams = _join(_ngrams(sequence, n) for sequence in kept)
            self.counts[n - 1] = np.bincount(_bucket(grams), minlength=_BUCKETS)
            if n == 1:
                self.num_symbols = len(np.unique(grams))
                continue
            _, first = np.unique(grams, return_index=True)
            histories = _join(_ngrams(sequence, n - 1)[:-1] for sequence in kept if len(sequence) >= n)
            self.followers[n - 2] = np.bincount(_bucket(histories[first]), minlength=_BUCKETS)

    def bits(self, sequence: np.ndarray) -> list[float]:
        """Return the mean bits per symbol at orders 1 to `order`, all over the same symbols.

        Args:
            sequence: Symbols, at least `order` of them.
        """
        skipped = self.order - 1
        probability = np.full(len(sequence) - skipped, 1 / _ALPHABET)
        found = []
        buckets = [_bucket(_ngrams(sequence, n)) for n in range(1, self.order + 1)]
        for n in range(1, self.order + 1):
            whole = self.counts[n - 1][buckets[n - 1]][skipped - n + 1 :].astype(np.float64)
            history: np.ndarray | float = float(self.total)
            followers: np.ndarray | float = float(self.num_symbols)
            if n > 1:
                behind = buckets[n - 2][skipped - n + 1 : -1]
                history = self.counts[n - 2][behind].astype(np.float64)
                followers = np.maximum(self.followers[n - 2][behind], 1).astype(np.float64)
            # Two n-grams in one bucket may count more than their history.
            probability = np.minimum((whole + followers * probability) / (history + followers), 1.0)
            found.append(float(-np.log2(probability).mean()))
        return found


def characters_of(text: str) -> np.ndarray:
    """Return a text's characters as symbols, digits as one and white space as one.

    Args:
        text: The text.
    """
    codes = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    codes[(codes >= 48) & (codes <= 57)] = 48
    codes[codes <= 32] = 32
    return codes[(codes != 32) | (np.concatenate([[0], codes[:-1]]) != 32)]


def _ngrams(sequence: np.ndarray, n: int) -> np.ndarray:
    return hash_ngrams(sequence + np.uint64(0x51_7C_C1_B7), n)


def _bucket(hashes: np.ndarray) -> np.ndarray:
    return ((hashes * np.uint64(0xC2B2AE3D27D4EB4F)) >> np.uint64(44)).astype(np.int64)


def _join(arrays: Iterable[np.ndarray]) -> np.ndarray:
    kept = list(arrays)
    return np.concatenate(kept) if kept else np.zeros(0, np.uint64)
