"""Documents as token blocks of one length, for training without padding.

Every document becomes ``<begin> text <end>``; all are joined into one stream and cut into blocks.
Attention is not masked at document borders, as in DeepSeek-V3 (arXiv 2412.19437, section 4.1); the begin and end
tokens tell the model where a text starts. So packed blocks need neither position ids nor a mask of their own.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from deepseek_records.document_tokens import mark_documents
from deepseek_training.data.token_cache import encode_cached


def encode_documents(texts: Sequence[str], tokenizer: Any) -> list[np.ndarray]:
    """Return each text's tokens between begin and end tokens, int32.

    Special tokens that a text spells out are encoded as plain text: data cannot end a document.

    Args:
        texts: The documents.
        tokenizer: A `transformers` tokenizer; where it has no begin token, none is put.

    Raises:
        ValueError: It has neither, or it makes a special token of plain text.
    """
    return mark_documents(encode_cached(texts, tokenizer), tokenizer)


class PackedDataset(Dataset):
    """Blocks of `sequence_length` tokens cut from the joined documents; the last, short one is left out.

    Args:
        documents: Token arrays as `encode_documents` returns them.
        sequence_length: Tokens a block.
        seed: Order in which the documents are joined.

    Raises:
        ValueError: The documents do not fill one block.
    """

    def __init__(self, documents: Sequence[np.ndarray], sequence_length: int, *, seed: int = 0) -> None:
        order = np.random.default_rng(seed).permutation(len(documents))
        stream = np.concatenate([documents[index] for index in order])
        num_blocks = len(stream) // sequence_length
        if num_blocks == 0:
            raise ValueError(f"data: {len(stream)} tokens do not fill one block of sequence_length={sequence_length}")
        self.blocks = torch.from_numpy(stream[: num_blocks * sequence_length].reshape(num_blocks, sequence_length))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = self.blocks[index].long()
        return {"input_ids": block, "labels": block}


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
        chosen = np.random.default_rng(seed).permutation(len(general))[:wanted]
        self.blocks = torch.cat([domain.blocks, general.blocks[torch.from_numpy(np.sort(chosen))]])

    __len__ = PackedDataset.__len__
    __getitem__ = PackedDataset.__getitem__


def cut_to_share(texts: Iterable[str], max_bytes: int | None) -> list[str]:
    """Return the same share of each text, from its beginning, so that together they hold at most `max_bytes`.

    A held-out set is shortened this way rather than by leaving out documents, so that each still counts.

    Args:
        texts: The documents.
        max_bytes: UTF-8 bytes to keep; None keeps all.
    """
    texts = list(texts)
    total = sum(len(text.encode()) for text in texts)
    if max_bytes is None or total <= max_bytes:
        return texts
    share = max_bytes / total
    cut = [text.encode()[: int(len(text.encode()) * share)].decode(errors="ignore") for text in texts]
    return [text for text in cut if text]
