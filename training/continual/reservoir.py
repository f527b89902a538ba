"""Blocks of earlier text that a run keeps, so that an update can replay what its model learned before.

Every source has the same number of places. Its blocks are a uniform sample of all of its blocks: when a source comes
and the places of each become fewer, a uniform part of the sample stays, which is a uniform sample again. One file
holds the blocks, where they come from, and a hash of all of it; it lies beside the model whose past it is.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from deepseek_records.hashes import hash_array, hash_rows
from deepseek_records.run_files import REPLAY_FILE


class StoredBlocks(Dataset):
    """Blocks in memory, as a part of `Mixture`.

    Args:
        blocks: `[N, S]` int32.
    """

    def __init__(self, blocks: np.ndarray) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.blocks[index].astype(np.int64))
        return {"input_ids": block, "labels": block}

    @property
    def identity(self) -> str:
        """A hash of the content."""
        return hash_array(self.blocks)


@dataclasses.dataclass(frozen=True)
class Reservoir:
    """The blocks by source.

    Attributes:
        blocks: By the source's name, `[n, S]` int32.
        num_seen: By the source's name, how many blocks the sample is of.
        capacity: Blocks in all, at most.
        tokenizer: Hash of the tokenizer that made them.
    """

    blocks: dict[str, np.ndarray]
    num_seen: dict[str, int]
    capacity: int
    tokenizer: str

    def add(self, name: str, part: Any, *, seed: int) -> "Reservoir":
        """Return the reservoir with one more source.

        Args:
            name: The source's.
            part: Its blocks, a data set of rows with ``input_ids`` `[S]`.
            seed: Of the sample.
        """
        places = self.capacity // (len(self.blocks) + 1)
        if places == 0:
            raise ValueError(f"replay_blocks: got {self.capacity}, expected at least one for each source")
        draws = np.random.default_rng([seed, len(self.blocks)])
        kept = {one: _sample(blocks, places, draws) for one, blocks in self.blocks.items()}
        chosen = np.sort(draws.permutation(len(part))[:places])
        taken = [part[int(index)]["input_ids"].numpy().astype(np.int32) for index in chosen]
        return dataclasses.replace(
            self, blocks={**kept, name: np.stack(taken)}, num_seen={**self.num_seen, name: len(part)}
        )

    def fits(self, names: Sequence[str], capacity: int, sequence_length: int) -> bool:
        """Return whether it holds what would be drawn.

        Args:
            names: Of the sources.
            capacity: Blocks in all.
            sequence_length: Tokens of a block.
        """
        lengths = {blocks.shape[1] for blocks in self.blocks.values()}
        return set(self.blocks) == set(names) and self.capacity == capacity and lengths == {sequence_length}

    @property
    def parts(self) -> list[StoredBlocks]:
        """The sources as parts of a mixture."""
        return [StoredBlocks(blocks) for blocks in self.blocks.values()]

    @property
    def identity(self) -> str:
        """A hash of all of it."""
        rows: list[Any] = [[name, hash_array(blocks), self.num_seen[name]] for name, blocks in self.blocks.items()]
        return hash_rows([*rows, self.capacity, self.tokenizer])

    def save(self, folder: Path) -> None:
        """Write ``replay.npz``, which is absent, old or whole.

        Args:
            folder: Beside the model whose past it is.
        """
        told = {
            "capacity": self.capacity,
            "tokenizer": self.tokenizer,
            "num_seen": self.num_seen,
            "hash": self.identity,
        }
        arrays: dict[str, Any] = {f"blocks{number}": blocks for number, blocks in enumerate(self.blocks.values())}
        temporary = folder / f"{REPLAY_FILE}.partial"
        with open(temporary, "wb") as file:
            np.savez_compressed(file, told=np.array(json.dumps(told)), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / REPLAY_FILE)

    @classmethod
    def load(cls, folder: Path) -> "Reservoir | None":
        """Return what `save` wrote, None where nothing was.

        Args:
            folder: Beside the model.

        Raises:
            ValueError: The file is damaged or was changed.
        """
        path = folder / REPLAY_FILE
        if not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as file:
                told = json.loads(str(file["told"]))
                blocks = {name: file[f"blocks{number}"] for number, name in enumerate(told["num_seen"])}
            found = cls(blocks, told["num_seen"], told["capacity"], told["tokenizer"])
            is_sound = found.identity == told["hash"]
        except Exception:  # whatever a damaged archive makes numpy, zlib and json raise
            is_sound = False
        if not is_sound:
            raise ValueError(f"replay: {path} is damaged or was changed; delete it, and it is drawn anew")
        return found


def _sample(blocks: np.ndarray, places: int, draws: np.random.Generator) -> np.ndarray:
    chosen: Sequence[int] = np.sort(draws.permutation(len(blocks))[:places])
    return blocks[chosen]
