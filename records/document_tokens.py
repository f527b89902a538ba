"""Documents as a language model sees them: ``<begin> text <end>``, and the windows in which long ones are read.

Training and evaluation both score text by these rules, so that their bits per byte are the same figure. Every token
counts, the end token included, and the begin token is given. A document longer than the context is read in overlapping
windows: each token is scored once, and only tokens of the first window have less than `CONTEXT_SHARE` of the context
before them.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

CONTEXT_SHARE = 0.25


def mark_documents(encoded: Iterable[Sequence[int]], tokenizer: Any) -> list[np.ndarray]:
    """Return each text's tokens between begin and end tokens, int32.

    Args:
        encoded: Each text's ids without special tokens.
        tokenizer: A `transformers` tokenizer; where it has no begin token, none is put.

    Raises:
        ValueError: It has neither.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not begin and not end:
        raise ValueError(
            "tokenizer: got one without begin and end token, expected at least one; nothing would tell the model "
            "where a text starts"
        )
    return [np.array([*begin, *ids, *end], dtype=np.int32) for ids in encoded]


def start_of_text(tokenizer: Any) -> list[int]:
    """Return what the model has seen in front of every document: the begin token, or without one the end of another.

    Args:
        tokenizer: A `transformers` tokenizer with at least one of the two.
    """
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [] if begin is None else [begin]


def with_start(documents: Iterable[np.ndarray], tokenizer: Any) -> list[np.ndarray]:
    """Return documents that all begin with `start_of_text`, so that each token of the text is predicted.

    Args:
        documents: From `mark_documents`.
        tokenizer: The same.
    """
    if tokenizer.bos_token_id is not None:
        return list(documents)
    start = np.array(start_of_text(tokenizer), dtype=np.int32)
    return [np.concatenate([start, document]) for document in documents]


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of a document that the model reads at once.

    Args:
        document: Which document.
        begin: Its first token.
        end: One past its last.
        first_target: The first token scored; those before are context.
    """

    document: int
    begin: int
    end: int
    first_target: int

    @property
    def num_targets(self) -> int:
        """Tokens scored."""
        return self.end - self.first_target


def cut_windows(documents: Sequence[np.ndarray], sequence_length: int) -> list[Window]:
    """Return windows of at most `sequence_length` tokens that score every token but each document's first, once.

    Args:
        documents: From `with_start`.
        sequence_length: Tokens the model sees at once.
    """
    overlap = max(1, int(sequence_length * CONTEXT_SHARE))
    windows = []
    for index, document in enumerate(documents):
        target, begin = 1, 0
        while target < len(document):
            end = min(begin + sequence_length, len(document))
            windows.append(Window(index, begin, end, target))
            target, begin = end, end - overlap
    return windows


@torch.no_grad()
def score_windows(model: Any, documents: Sequence[np.ndarray], batch: Sequence[Window]) -> list[float]:
    """Return each window's summed -log P of its targets, in nats, from one forward pass.

    Padding is on the right, where causal attention cannot see it.

    Args:
        model: A causal language model in evaluation mode.
        documents: What the windows were cut from.
        batch: The windows.
    """
    length = max(window.end - window.begin for window in batch)
    inputs = torch.zeros(len(batch), length, dtype=torch.long)
    is_target = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, window in enumerate(batch):
        tokens = documents[window.document][window.begin : window.end]
        inputs[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
        is_target[row, window.first_target - window.begin : len(tokens)] = True
    device = next(model.parameters()).device
    inputs, is_target = inputs.to(device), is_target.to(device)
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), inputs[:, 1:], reduction="none")
    sums: list[float] = (losses.double() * is_target[:, 1:]).sum(dim=1).tolist()
    return sums
