"""Packing that keeps documents apart: attention never crosses from one to another, and hardly a token is padding.

Whole documents are put into blocks by best fit, the longest first (Ding et al. 2024, arXiv 2404.10830). Each begins at
position 0: that is how transformers' attention, for every family, and our routers tell where one ends. A document
longer than a block is cut; a part begins with the last token of the part before, so that each token but a document's
first is predicted once.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from deepseek_records.hashes import hash_rows, hash_texts
from deepseek_training.data.packing import document_lengths, read_part
from deepseek_training.data.token_cache import StoredTokens

_IGNORED = -100  # of labels, as in transformers


class SeparateDataset(Dataset):
    """Blocks of `sequence_length` tokens of whole documents, or parts of long ones.

    Args:
        documents: Token arrays as `encode_documents` returns them.
        sequence_length: Tokens per block.
        pad_token_id: What fills the rest of a block; no loss is taken of it.
        seed: Order of documents of equal length.

    Attributes:
        waste: Share of the blocks' tokens that are padding.

    Raises:
        ValueError: There is no document of at least two tokens.
    """

    def __init__(
        self, documents: Sequence[np.ndarray], sequence_length: int, *, pad_token_id: int, seed: int = 0
    ) -> None:
        self.documents, self.sequence_length = documents, sequence_length
        self.pad_token_id, self.seed = pad_token_id, seed
        lengths = document_lengths(documents)
        self._owners, self._begins, self._sizes = _cut(lengths, sequence_length, seed)
        if not len(self._sizes):
            raise ValueError("data: got no document of two tokens or more, expected some")
        self._blocks = best_fit(self._sizes, sequence_length)
        self.waste = 1 - float(self._sizes.sum()) / (len(self._blocks) * sequence_length)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens: np.ndarray = np.full(self.sequence_length, self.pad_token_id, dtype=np.int64)
        labels: np.ndarray = np.full(self.sequence_length, _IGNORED, dtype=np.int64)
        positions: np.ndarray = np.zeros(self.sequence_length, dtype=np.int64)
        place: int = 0
        for part in self._blocks[index]:
            begin, size = int(self._begins[part]), int(self._sizes[part])
            tokens[place : place + size] = read_part(self.documents, int(self._owners[part]), begin, begin + size)
            labels[place + 1 : place + size] = tokens[place + 1 : place + size]
            positions[place : place + size] = range(size)
            place += size
        positions[place:] = range(self.sequence_length - place)
        arrays = {"input_ids": tokens, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @functools.cached_property
    def identity(self) -> str:
        """A hash of the content."""
        known = self.documents.fingerprint if isinstance(self.documents, StoredTokens) else _hash(self.documents)
        return hash_rows([known, self.sequence_length, self.pad_token_id, self.seed, "separate"])


def _hash(documents: Sequence[np.ndarray]) -> str:
    return hash_texts(document.tobytes().decode("latin-1") for document in documents)


def _cut(lengths: np.ndarray, limit: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, first token and size of each part, the longest part first; equal ones in an order by the seed."""
    owners = np.flatnonzero(lengths >= 2)
    counts = 1 + np.maximum(0, -(-(lengths[owners] - limit) // (limit - 1)))
    number = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    owners = np.repeat(owners, counts)
    begins = number * (limit - 1)
    sizes = np.minimum(lengths[owners] - begins, limit)
    shuffled = np.random.default_rng(seed).permutation(len(sizes))
    order = shuffled[np.argsort(-sizes[shuffled], kind="stable")]
    return owners[order], begins[order], sizes[order]


def best_fit(sizes: np.ndarray, limit: int) -> list[list[int]]:
    """Return which items each bin gets: each goes into the fullest one that has room for it.

    Args:
        sizes: Of the items, descending.
        limit: Size of a bin.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(limit + 1)]  # bins by the room that they have
    rooms = 0  # bit r is set where a bin has the room r
    for item, size in enumerate(sizes.tolist()):
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            place = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, place = limit, len(bins)
            bins.append([])
        bins[place].append(item)
        if room > size:
            with_room[room - size].append(place)
            rooms |= 1 << (room - size)
    return bins
