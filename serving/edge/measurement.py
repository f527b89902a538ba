"""How far an exported model is from the model it was made of: logits, likeliest tokens, bits per byte.

Every export measures what it wrote and puts the figures into ``export.json``. All of them read the same windows of the
same text, so that a difference is one of the format.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepseek_records.document_tokens import Window, cut_windows, mark_documents, with_start

# Logits of a window: token ids [S] in, [S, vocabulary] out.
Forward = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """An exported model against the model itself.

    Args:
        num_tokens: Tokens compared.
        largest_logit_difference: Of any logit.
        argmax_agreement: Share of tokens whose likeliest next token is the same.
        bits_per_byte: Of the exported model on the text.
        bits_per_byte_of_model: Of the model itself.
    """

    num_tokens: int
    largest_logit_difference: float
    argmax_agreement: float
    bits_per_byte: float
    bits_per_byte_of_model: float

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_logit_difference:.1e}, same likeliest token on "
            f"{self.argmax_agreement:.2%} of {self.num_tokens:,} tokens, bits per byte {self.bits_per_byte:.4f} "
            f"(the model itself {self.bits_per_byte_of_model:.4f})"
        )


class ProbeText:
    """A text as windows of tokens, with the model's own logits of each.

    Args:
        model: In fp32.
        tokenizer: Its tokenizer.
        texts: Documents.
        most_tokens: Documents are taken until so many tokens are scored; each is cut at so many.
        most_window: Tokens that are read at once, at most 128.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: Sequence[str],
        most_tokens: int = 2000,
        most_window: int = 128,
    ) -> None:
        # A document may be a book; only its beginning is scored.
        beginnings = [text[: 8 * most_tokens] for text in texts[:100]]
        encoded = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in beginnings]
        documents = with_start(mark_documents(encoded, tokenizer), tokenizer)
        lengths = np.cumsum([len(document) for document in documents])
        num_kept = min(len(documents), int(np.searchsorted(lengths, most_tokens)) + 1)
        documents = [document[:most_tokens] for document in documents[:num_kept]]
        self.windows: list[tuple[np.ndarray, Window]] = [
            (documents[window.document][window.begin : window.end].astype(np.int64), window)
            for window in cut_windows(documents, min(most_window, 128, model.config.max_position_embeddings))
        ]
        self.num_bytes = sum(
            len(tokenizer.decode(document, skip_special_tokens=True).encode()) for document in documents
        )
        self.own = [forward_of(model)(ids) for ids, _ in self.windows]

    def compare(self, forward: Forward) -> Agreement:
        """Return how far other logits are from the model's.

        Args:
            forward: The exported model.
        """
        num_tokens, num_same, largest, nats, own_nats = 0, 0, 0.0, 0.0, 0.0
        for (ids, window), own in zip(self.windows, self.own, strict=True):
            logits = forward(ids)
            largest = max(largest, float(np.abs(logits - own).max()))
            num_same += int((logits.argmax(-1) == own.argmax(-1)).sum())
            num_tokens += len(ids)
            nats += _nats(logits, ids, window)
            own_nats += _nats(own, ids, window)
        scale = 1 / (self.num_bytes * math.log(2))
        return Agreement(num_tokens, largest, num_same / num_tokens, nats * scale, own_nats * scale)


def forward_of(model: PreTrainedModel) -> Forward:
    """Return the logits of a torch model as a function of token ids.

    Args:
        model: In evaluation mode.
    """

    @torch.no_grad()
    def forward(ids: np.ndarray) -> np.ndarray:
        logits: np.ndarray = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()
        return logits

    return forward


def _nats(logits: np.ndarray, ids: np.ndarray, window: Window) -> float:
    """Summed -log P of a window's targets."""
    first = window.first_target - window.begin
    logps = torch.from_numpy(logits[first - 1 : -1]).log_softmax(-1)
    return -float(logps.gather(1, torch.from_numpy(ids[first:])[:, None]).double().sum())
