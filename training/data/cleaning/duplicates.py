"""Exact and near-duplicates over all sources and splits, by MinHash and bands of it.

A text's signature is datasketch's MinHash of its word 5-grams. Two texts that agree in all values of one of the bands
are compared by their whole signatures. Bands are grouped by sorting rather than in a dictionary of buckets as in
datasketch's `MinHashLSH`: it finds the same pairs, in a few hundred bytes per document. Of a group of duplicates one
text stays, a held-out one before a training one, else the first.
"""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from deepseek_training.data.cleaning.words import hash_ngrams, hash_words, words_of

NUM_PERMUTATIONS = 128
_SHINGLE = 5
_SMALL_BUCKET = 40
_MASK = np.uint64(0xFFFFFFFF)


@functools.cache
def _empty(seed: int) -> Any:
    from datasketch import MinHash

    return MinHash(num_perm=NUM_PERMUTATIONS, seed=seed, hashfunc=int, scheme="affine32")


def sign(text: str, seed: int) -> np.ndarray:
    """Return a text's signature, uint32 [NUM_PERMUTATIONS].

    Args:
        text: The text.
        seed: Of the permutations.
    """
    words = hash_words(words_of(text))
    shingles = hash_ngrams(words, min(_SHINGLE, max(1, len(words))))
    signature = _empty(seed).copy()
    signature.update_batch((np.unique(shingles) & _MASK).tolist())
    return np.asarray(signature.hashvalues, np.uint32)


def band_layout(threshold: float) -> tuple[int, int]:
    """Return bands and rows of each: the most rows that still find nine in ten pairs at the threshold.

    Args:
        threshold: Jaccard similarity.
    """
    best = (NUM_PERMUTATIONS, 1)
    for rows in range(1, NUM_PERMUTATIONS + 1):
        bands = NUM_PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** bands >= 0.9:
            best = (bands, rows)
    return best


def find_duplicates(
    signatures: np.ndarray, exact: np.ndarray, priority: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each text the one that stays in its place, and whether it is an exact copy of that one.

    Args:
        signatures: From `sign`, [texts, NUM_PERMUTATIONS].
        exact: A hash of each text's words.
        priority: The lower, the sooner it stays; among equals the first does.
        threshold: Estimated Jaccard similarity from which two texts are duplicates.

    Returns:
        Index of the text that stays, its own for one that does; and True for exact copies.
    """
    parents = np.arange(len(exact))
    _, first, inverse = np.unique(exact, return_index=True, return_inverse=True)
    originals = first[inverse]
    for text in np.flatnonzero(originals != np.arange(len(exact))).tolist():
        _join(parents, text, int(originals[text]))
    distinct = np.unique(first)
    for one, other in candidate_pairs(signatures[distinct], threshold):
        a, b = int(distinct[one]), int(distinct[other])
        if _find(parents, a) == _find(parents, b):
            continue
        if np.mean(signatures[a] == signatures[b]) >= threshold:
            _join(parents, a, b)
    roots = np.array([_find(parents, text) for text in range(len(exact))], np.int64)
    order = np.lexsort((np.arange(len(exact)), priority))
    keeper: np.ndarray = np.full(len(exact), -1, np.int64)
    for text in order.tolist():
        if keeper[roots[text]] < 0:
            keeper[roots[text]] = text
    stays = keeper[roots] if len(roots) else roots
    return stays, (exact == exact[stays]) & (stays != np.arange(len(exact)))


def candidate_pairs(signatures: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """Yield pairs of texts that agree in a band.

    Args:
        signatures: As for `find_duplicates`.
        threshold: Likewise.
    """
    bands, rows = band_layout(threshold)
    for band in range(bands):
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])
        keys = part.view(np.dtype((np.void, part.dtype.itemsize * rows))).ravel()
        _, inverse = np.unique(keys, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(inverse[order])) + 1)
        for group in groups:
            for place in range(1, len(group)):
                # In a large bucket each with its neighbor and the first: all pairs would be its square.
                others = group[:place] if len(group) <= _SMALL_BUCKET else {int(group[0]), int(group[place - 1])}
                for other in sorted(map(int, others)):
                    yield other, int(group[place])


def _find(parents: np.ndarray, text: int) -> int:
    while parents[text] != text:
        parents[text] = parents[parents[text]]
        text = int(parents[text])
    return text


def _join(parents: np.ndarray, one: int, other: int) -> None:
    a, b = _find(parents, one), _find(parents, other)
    if a != b:
        parents[max(a, b)] = min(a, b)
