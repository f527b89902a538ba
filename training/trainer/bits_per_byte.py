"""Bits per byte on held-out text: the one measure of a language model that tokenizers cannot flatter.

    bits per byte = sum over tokens of -log2 P(token | before) / UTF-8 bytes of the text

`pretrain` and `adapt` report it, for the model and for the bigram on the same tokens. Every token counts, the end
token included, and the begin token is given. Surprising: a document longer than the context is read in overlapping
windows, so that only tokens of the first window have less than `CONTEXT_SHARE` of the context before them.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deepseek_training.trainer.bigram import BigramModel

CONTEXT_SHARE = 0.25


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


@dataclasses.dataclass(frozen=True)
class _Window:
    document: int
    begin: int
    end: int
    first_target: int


def _windows(documents: Sequence[np.ndarray], sequence_length: int) -> list[_Window]:
    """Windows of at most `sequence_length` tokens whose targets cover every token but each document's first, once."""
    overlap = max(1, int(sequence_length * CONTEXT_SHARE))
    windows = []
    for index, document in enumerate(documents):
        target, begin = 1, 0
        while target < len(document):
            end = min(begin + sequence_length, len(document))
            windows.append(_Window(index, begin, end, target))
            target, begin = end, end - overlap
    return windows


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
    windows = _windows(documents, sequence_length)
    # equal lengths together, so that short documents cost no padding; the order is undone by summing
    windows.sort(key=lambda window: window.begin - window.end)
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        nats = []
        for start in range(0, len(windows), batch_size):
            nats += _window_nats(model, documents, windows[start : start + batch_size], device)
    finally:
        model.train(was_training)
    return BitsPerByte.from_windows(nats, [window.end - window.first_target for window in windows], num_bytes)


def _window_nats(model: Any, documents: Sequence[np.ndarray], batch: list[_Window], device: Any) -> list[float]:
    """Summed -log P of each window's targets. Padding is on the right, where causal attention cannot see it."""
    length = max(window.end - window.begin for window in batch)
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    is_target = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, window in enumerate(batch):
        tokens = documents[window.document][window.begin : window.end]
        inputs[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        is_target[row, window.first_target - window.begin : len(tokens)] = True
    inputs, is_target = inputs.to(device), is_target.to(device)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), inputs[:, 1:], reduction="none")
    return (losses.double() * is_target[:, 1:]).sum(dim=1).tolist()


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
    windows = _windows(documents, sequence_length)
    sums = [float(nats[window.document][window.first_target - 1 : window.end - 1].sum()) for window in windows]
    return BitsPerByte.from_windows(sums, [window.end - window.first_target for window in windows], num_bytes)
