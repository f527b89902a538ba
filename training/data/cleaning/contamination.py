"""Finds benchmark items in training text by their word n-grams.

An item is leaked by a text that holds a stated share of its n-grams: so an item with changed case, spaces or
punctuation, or with its ends cut off, is found, and a common phrase is not. Of items of 13 words and more the 13-grams
count, as for GPT-3, of shorter ones the 8-grams; what has fewer words cannot be told from ordinary language and is
only counted. The texts of the items are handed in: what is a benchmark is known elsewhere.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_training.data.cleaning.words import hash_ngrams, hash_words, words_of

_LONG, _SHORT = 13, 8


@dataclasses.dataclass
class ContaminationIndex:
    """N-grams of benchmark items, sorted for the search.

    Args:
        names: Of the items, ``task/id``.
        hashes: By length of n-gram, all hashes, sorted, uint64.
        owners: By length, the index of the item that each hash is of.
        sizes: Distinct n-grams of each item.
        num_short: Items with too few words to be searched for, by task.
    """

    names: list[str]
    hashes: dict[int, np.ndarray]
    owners: dict[int, np.ndarray]
    sizes: np.ndarray
    num_short: dict[str, int]

    @classmethod
    def build(cls, items: Mapping[str, Sequence[tuple[str, str]]]) -> "ContaminationIndex":
        """Return the index of items.

        Args:
            items: By task, of each item its id and its text.
        """
        names: list[str] = []
        sizes: list[int] = []
        found: dict[int, list[np.ndarray]] = {_LONG: [], _SHORT: []}
        owners: dict[int, list[np.ndarray]] = {_LONG: [], _SHORT: []}
        num_short: dict[str, int] = {}
        for task, texts in items.items():
            for item_id, text in texts:
                words = hash_words(words_of(text))
                n = _LONG if len(words) >= _LONG else _SHORT
                ngrams = np.unique(hash_ngrams(words, n))
                if not len(ngrams):
                    num_short[task] = num_short.get(task, 0) + 1
                    continue
                found[n].append(ngrams)
                owners[n].append(np.full(len(ngrams), len(names), np.int32))
                names.append(f"{task}/{item_id}")
                sizes.append(len(ngrams))
        hashes, sorted_owners = {}, {}
        for n, arrays in found.items():
            joined = np.concatenate(arrays) if arrays else np.zeros(0, np.uint64)
            order = np.argsort(joined, kind="stable")
            hashes[n] = joined[order]
            sorted_owners[n] = np.concatenate(owners[n])[order] if arrays else np.zeros(0, np.int32)
        return cls(names, hashes, sorted_owners, np.array(sizes, np.int32), num_short)

    def find(self, text: str, min_share: float) -> list[tuple[str, float]]:
        """Return the items that a text holds, with the share of each's n-grams, the largest first.

        Args:
            text: The text.
            min_share: Share of an item's n-grams from which it counts.
        """
        if not self.names:
            return []
        words = hash_words(words_of(text))
        counts: dict[int, int] = {}
        for n, hashes in self.hashes.items():
            ngrams = np.unique(hash_ngrams(words, n))
            starts: Any = np.searchsorted(hashes, ngrams, "left")
            ends: Any = np.searchsorted(hashes, ngrams, "right")
            for place in np.flatnonzero(ends > starts).tolist():
                for owner in self.owners[n][starts[place] : ends[place]].tolist():
                    counts[owner] = counts.get(owner, 0) + 1
        shares = [(self.names[owner], count / int(self.sizes[owner])) for owner, count in counts.items()]
        return sorted((one for one in shares if one[1] >= min_share), key=lambda one: (-one[1], one[0]))
