"""Blocks of several sources in one fixed order, by weight."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from deepseek_records.hashes import hash_rows
from deepseek_training.data.packing import PackedDataset
from deepseek_training.data.separate import SeparateDataset


class Mixture(Dataset):
    """A stream of blocks in which every stretch holds each source in the share of its weight.

    The order is a function of the sources, weights and seed alone: block i is the same whatever the number of
    processes, and a longer stream begins like a shorter one. A source that is used up comes again in another order.

    Args:
        parts: The sources' blocks.
        weights: Of the sources; at least one is above 0.
        num_blocks: Length of the stream.
        seed: Of the orders.
    """

    def __init__(
        self,
        parts: Sequence[PackedDataset | SeparateDataset],
        weights: Sequence[float],
        num_blocks: int,
        *,
        seed: int = 0,
    ) -> None:
        self.parts, self.weights, self.seed = parts, list(weights), seed
        shares = np.array(weights, dtype=np.float64) / sum(weights)
        counts = np.ceil(shares * num_blocks).astype(np.int64) + 1
        # A source of share w has its blocks at the times 0.5 / w, 1.5 / w, ...
        times = np.concatenate([(np.arange(n) + 0.5) / w for n, w in zip(counts, shares, strict=True) if w])
        owners: np.ndarray = np.repeat(np.arange(len(parts)), np.where(shares > 0, counts, 0))
        order = np.argsort(times, kind="stable")[:num_blocks]
        self.owners = owners[order].astype(np.int32)
        self.places: np.ndarray = np.zeros(num_blocks, dtype=np.int64)
        for number, part in enumerate(parts):
            mine = self.owners == number
            self.places[mine] = _passes(len(part), int(mine.sum()), (seed, number))

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.parts[self.owners[index]][int(self.places[index])]

    @property
    def identity(self) -> str:
        """A hash of the content."""
        return hash_rows([[part.identity for part in self.parts], self.weights, len(self), self.seed])

    def counts(self) -> list[int]:
        """Return how many blocks of each source are used."""
        return [int(count) for count in np.bincount(self.owners, minlength=len(self.parts))]


def _passes(size: int, count: int, seed: tuple[int, int]) -> np.ndarray:
    """Indices below `size`, `count` of them: one permutation after another."""
    orders = [np.random.default_rng([*seed, number]).permutation(size) for number in range(-(-count // size))]
    return np.concatenate(orders)[:count] if orders else np.zeros(0, dtype=np.int64)
