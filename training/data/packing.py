"""Documents as token blocks of one length, for training without padding.

Every document becomes ``<begin> text <end>``; all are joined into one stream and cut into blocks.
Attention is not masked at document borders, as in DeepSeek-V3 (arXiv 2412.19437, section 4.1); the begin and end
tokens tell the model where a text starts. So packed blocks need neither position ids nor a mask of their own.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from deepseek_records.document_tokens import mark_documents
from deepseek_records.hashes import hash_array, hash_rows
from deepseek_training.data.mapped_texts import MappedTexts
from deepseek_training.data.texts import count_bytes
from deepseek_training.data.token_cache import StoredTokens, encode_cached, encode_mapped

_LEAST_CUT = 50  # bytes


def encode_documents(texts: Sequence[str], tokenizer: Any) -> Sequence[np.ndarray]:
    """Return each text's tokens between begin and end tokens, int32.

    Special tokens that a text spells out are encoded as plain text: data cannot end a document.

    Args:
        texts: The documents; the tokens of mapped ones stay on disk.
        tokenizer: A `transformers` tokenizer; where it has no begin token, none is put.

    Raises:
        ValueError: It has neither, or it makes a special token of plain text.
    """
    if isinstance(texts, MappedTexts):
        return encode_mapped(texts, tokenizer)
    return mark_documents(encode_cached(texts, tokenizer), tokenizer)


class PackedDataset(Dataset):
    """Blocks of `sequence_length` tokens cut from the joined documents; the last, short one is left out.

    A block is put together when it is asked for, so documents that are on disk stay there.

    Args:
        documents: Token arrays as `encode_documents` returns them.
        sequence_length: Tokens a block.
        seed: Order in which the documents are joined.

    Raises:
        ValueError: The documents do not fill one block.
    """

    def __init__(self, documents: Sequence[np.ndarray], sequence_length: int, *, seed: int = 0) -> None:
        self.documents, self.sequence_length, self.seed = documents, sequence_length, seed
        self._order = np.random.default_rng(seed).permutation(len(documents))
        self._ends = document_lengths(documents)[self._order].cumsum()
        num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        self._num_blocks = num_tokens // sequence_length
        if self._num_blocks == 0:
            raise ValueError(f"data: {num_tokens} tokens do not fill one block of sequence_length={sequence_length}")

    def __len__(self) -> int:
        return self._num_blocks

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.read(index)).long()
        return {"input_ids": block, "labels": block}

    def read(self, index: int) -> np.ndarray:
        """Return the tokens of a block.

        Args:
            index: Which, from 0.
        """
        if not 0 <= index < self._num_blocks:
            raise IndexError(index)
        begin = index * self.sequence_length
        place = int(np.searchsorted(self._ends, begin, side="right"))
        start = int(self._ends[place - 1]) if place else 0
        parts, missing = [], self.sequence_length
        while missing:
            first = begin - start
            parts.append(read_part(self.documents, int(self._order[place]), first, first + missing))
            missing -= len(parts[-1])
            start, place = int(self._ends[place]), place + 1
            begin = start
        return np.concatenate(parts)

    @functools.cached_property
    def blocks(self) -> torch.Tensor:
        """All blocks in memory, int32 `[blocks, sequence_length]`."""
        stream = np.concatenate([self.documents[index] for index in self._order])
        used = stream[: self._num_blocks * self.sequence_length]
        return torch.from_numpy(used.reshape(self._num_blocks, self.sequence_length))

    @property
    def identity(self) -> str:
        """A hash of the content."""
        if isinstance(self.documents, StoredTokens):
            return hash_rows([self.documents.fingerprint, self.sequence_length, self.seed])
        return hash_array(self.blocks.numpy())


class MixedDataset(Dataset):
    """Blocks of two data sets, drawn so that every stretch of training holds the wanted share of the second.

    Args:
        domain: The first, used whole.
        general: The second, replayed so that the model does not forget it.
        replay_share: Share of blocks from `general`, in [0, 1).
        seed: Which of `general`'s blocks are taken.

    Raises:
        ValueError: `general` has too few blocks for the share.
    """

    def __init__(self, domain: PackedDataset, general: PackedDataset, replay_share: float, *, seed: int = 0) -> None:
        wanted = round(len(domain) * replay_share / (1 - replay_share))
        if wanted > len(general):
            raise ValueError(
                f"replay_share={replay_share} needs {wanted} blocks of general text, but there are {len(general)}; "
                "lower it or give more general text"
            )
        self.domain, self.general = domain, general
        self._chosen = np.sort(np.random.default_rng(seed).permutation(len(general))[:wanted])

    def __len__(self) -> int:
        return len(self.domain) + len(self._chosen)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index < len(self.domain):
            return self.domain[index]
        return self.general[int(self._chosen[index - len(self.domain)])]

    @property
    def blocks(self) -> torch.Tensor:
        """All blocks in memory, int32 `[blocks, sequence_length]`."""
        return torch.cat([self.domain.blocks, self.general.blocks[torch.from_numpy(self._chosen)]])

    @property
    def identity(self) -> str:
        """A hash of the content."""
        return hash_rows([self.domain.identity, self.general.identity, hash_array(self._chosen)])


def read_part(documents: Sequence[np.ndarray], index: int, begin: int, end: int) -> np.ndarray:
    """Return some tokens of a document, of a stored one without reading the rest.

    Args:
        documents: From `encode_documents`.
        index: Which document.
        begin: The first token.
        end: One past the last.
    """
    if isinstance(documents, StoredTokens):
        return documents.read(index, begin, end)
    return documents[index][begin:end]


def document_lengths(documents: Sequence[np.ndarray]) -> np.ndarray:
    """Return the tokens of each document, int64.

    Args:
        documents: From `encode_documents`.
    """
    if isinstance(documents, StoredTokens):
        return documents.lengths
    return np.fromiter(map(len, documents), np.int64, len(documents))


def cut_to_share(texts: Sequence[str], max_bytes: int | None) -> Sequence[str]:
    """Return the same share of each text, from its beginning, so that together they hold at most `max_bytes`.

    A held-out set is shortened this way rather than by leaving out documents, so that each still counts. Only where
    less than `_LEAST_CUT` bytes of each would be left, evenly spaced documents are taken.

    Args:
        texts: The documents.
        max_bytes: UTF-8 bytes to keep; None keeps all.
    """
    total = count_bytes(texts)
    if max_bytes is None or total <= max_bytes:
        return texts
    kept = max(1, max_bytes // _LEAST_CUT)
    if len(texts) > kept:
        places = np.linspace(0, len(texts) - 1, kept).round().astype(int)
        texts = [texts[place] for place in places]
        total = count_bytes(texts)
    share = min(1.0, max_bytes / total)
    cut = [text.encode()[: int(len(text.encode()) * share)].decode(errors="ignore") for text in texts]
    return [text for text in cut if text]
