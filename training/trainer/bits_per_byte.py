"""Bits per byte on held-out text: the one measure of a language model that tokenizers cannot flatter.

    bits per byte = sum over tokens of -log2 P(token | before) / UTF-8 bytes of the text

`pretrain` and `adapt` report it, for the model and for the bigram on the same tokens; the rules are those of
`deepseek_records.document_tokens`, by which the evaluation task ``bits_per_byte`` scores any text.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch

from deepseek_records.document_tokens import Window, cut_windows, score_windows
from deepseek_training.trainer.bigram import BigramModel


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
    """A measured value.

    Args:
        value: Bits per byte.
        stderr: Its standard error over windows (a ratio of two sums, by linearisation).
        num_tokens: Tokens scored.
        num_bytes: UTF-8 bytes of the text.
        num_windows: Windows, the units of the standard error.
    """

    value: float
    stderr: float
    num_tokens: int
    num_bytes: int
    num_windows: int

    @classmethod
    def from_windows(cls, nats: Sequence[float], num_tokens: Sequence[int], num_bytes: int) -> "BitsPerByte":
        """Return the measure from each window's summed -log P and number of tokens.

        Raises:
            ValueError: A sum is NaN or infinite.
        """
        if not all(map(math.isfinite, nats)):
            raise ValueError(
                "bits per byte: the model's losses are NaN or infinite; its weights are damaged or training diverged"
            )
        nats, tokens = np.asarray(nats, dtype=np.float64), np.asarray(num_tokens, dtype=np.float64)
        spread = math.sqrt(float(np.square(nats - tokens * nats.sum() / tokens.sum()).sum()))
        scale = 1 / (math.log(2) * num_bytes)
        return cls(float(nats.sum()) * scale, spread * scale, int(tokens.sum()), num_bytes, len(nats))


@torch.no_grad()
def measure_model(
    model: torch.nn.Module,
    documents: Sequence[np.ndarray],
    num_bytes: int,
    *,
    sequence_length: int,
    batch_size: int = 16,
) -> BitsPerByte:
    """Return the model's bits per byte; its mode and the random state are left as they were.

    Args:
        model: A causal language model.
        documents: Token arrays from `encode_documents`.
        num_bytes: UTF-8 bytes of the texts they came from.
        sequence_length: Tokens the model sees at once.
        batch_size: Windows a forward pass.
    """
    nats, num_tokens = measure_windows(model, documents, sequence_length=sequence_length, batch_size=batch_size)
    return BitsPerByte.from_windows(nats, num_tokens, num_bytes)


def measure_windows(
    model: torch.nn.Module, documents: Sequence[np.ndarray], *, sequence_length: int, batch_size: int
) -> tuple[list[float], list[int]]:
    """Return each window's summed -log P and number of tokens, in an order that the documents alone decide.

    Args:
        model: A causal language model.
        documents: As for `measure_model`, as are the next two.
        sequence_length: Tokens the model sees at once.
        batch_size: Windows a forward pass.
    """
    windows, nats = _score(model, documents, sequence_length, batch_size)
    return nats, [window.num_targets for window in windows]


def measure_documents(
    model: torch.nn.Module, documents: Sequence[np.ndarray], *, sequence_length: int, batch_size: int
) -> np.ndarray:
    """Return each document's summed -log P, `[N]` float64 in nats.

    Args:
        model: A causal language model.
        documents: As for `measure_model`, as are the next two.
        sequence_length: Tokens the model sees at once.
        batch_size: Windows a forward pass.
    """
    sums: np.ndarray = np.zeros(len(documents))
    for window, nats in zip(*_score(model, documents, sequence_length, batch_size), strict=True):
        sums[window.document] += nats
    return sums


@torch.no_grad()
def _score(
    model: torch.nn.Module, documents: Sequence[np.ndarray], sequence_length: int, batch_size: int
) -> tuple[list[Window], list[float]]:
    """The windows of documents, and of each its summed -log P."""
    windows = cut_windows(documents, sequence_length)
    # equal lengths together, so that short documents cost no padding; the order is undone by summing
    windows.sort(key=lambda window: window.begin - window.end)
    was_training = model.training
    model.eval()
    try:
        nats = []
        for start in range(0, len(windows), batch_size):
            nats += score_windows(model, documents, windows[start : start + batch_size])
    finally:
        model.train(was_training)
    return windows, nats


def measure_bigram(
    bigram: BigramModel, documents: Sequence[np.ndarray], num_bytes: int, *, sequence_length: int
) -> BitsPerByte:
    """Return the bigram's bits per byte on the same tokens and windows.

    Args:
        bigram: The baseline.
        documents: As for `measure_model`.
        num_bytes: As for `measure_model`.
        sequence_length: As for `measure_model`; here it only sets the units of the standard error.
    """
    nats = [bigram.nats(document) for document in documents]
    windows = cut_windows(documents, sequence_length)
    sums = [float(nats[window.document][window.first_target - 1 : window.end - 1].sum()) for window in windows]
    return BitsPerByte.from_windows(sums, [window.num_targets for window in windows], num_bytes)
