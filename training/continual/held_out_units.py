"""Held-out text as the gate counts it: documents, each with its bits under a model, in two halves.

One half chooses between candidates, the other decides whether the chosen one is kept: a candidate that was picked
because it looked best on some documents looks better on them than it is. Where a set has fewer than `LEAST_DOCUMENTS`,
as of whole books, its units are passages of these; the less text there is, the shorter, down to `_LEAST_BYTES`.
"""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from deepseek_records.document_tokens import with_start
from deepseek_training.data.packing import cut_to_share, encode_documents
from deepseek_training.data.texts import count_bytes
from deepseek_training.trainer.bits_per_byte import measure_documents

LEAST_DOCUMENTS = 16
# Into about so many passages a set of fewer documents is cut, of so many UTF-8 bytes at least and at most.
_PASSAGES, _LEAST_BYTES, _MOST_BYTES = 64, 200, 2000
# A half must have as many for an error that says anything.
LEAST_UNITS = 8
Half = Literal["choose", "decide"]


@dataclasses.dataclass(frozen=True)
class HeldOutUnits:
    """One held-out set.

    Attributes:
        name: As figures carry it.
        unit: What an error counts.
        texts: The units.
        documents: Their tokens.
        num_bytes: `[N]` UTF-8 bytes of each.
        is_decider: `[N]` bool, the half that decides.
    """

    name: str
    unit: Literal["document", "passage"]
    texts: Sequence[str]
    documents: Sequence[np.ndarray]
    num_bytes: np.ndarray
    is_decider: np.ndarray

    @classmethod
    def prepare(cls, name: str, texts: Sequence[str], tokenizer: Any, max_bytes: int | None) -> "HeldOutUnits":
        """Return the set, shortened to `max_bytes` and encoded.

        Args:
            name: As figures carry it.
            texts: The documents.
            tokenizer: The model's.
            max_bytes: UTF-8 bytes to keep of the set; None keeps all.

        Raises:
            ValueError: It has too few units for two halves with an error.
        """
        unit: Literal["document", "passage"] = "document"
        units = list(cut_to_share(texts, max_bytes))
        if len(units) < LEAST_DOCUMENTS:
            size = min(_MOST_BYTES, max(_LEAST_BYTES, count_bytes(units) // _PASSAGES))
            unit, units = "passage", [piece for text in units for piece in cut_passages(text, size)]
        if len(units) < 2 * LEAST_UNITS:
            raise ValueError(_too_few(name, len(units), count_bytes(units), count_bytes(texts)))
        places = sorted(range(len(units)), key=lambda place: hashlib.sha256(units[place].encode()).digest())
        is_decider: np.ndarray = np.zeros(len(units), dtype=bool)
        is_decider[places[::2]] = True
        documents = with_start(encode_documents(units, tokenizer), tokenizer)
        num_bytes = np.array([len(text.encode()) for text in units], dtype=np.float64)
        return cls(name, unit, units, documents, num_bytes, is_decider)

    def measure(self, model: Any, *, sequence_length: int, batch_size: int, half: Half | None = None) -> np.ndarray:
        """Return each unit's bits under a model, `[N]` float64.

        Args:
            model: A causal language model.
            sequence_length: Tokens that the model sees at once.
            batch_size: Windows of a forward pass.
            half: Of which units; None: all.
        """
        places = range(len(self.documents)) if half is None else np.flatnonzero(self.half(half)).tolist()
        documents = [self.documents[place] for place in places]
        nats = measure_documents(model, documents, sequence_length=sequence_length, batch_size=batch_size)
        return nats / np.log(2)

    def half(self, half: Half) -> np.ndarray:
        """Return which units belong to a half, `[N]` bool."""
        return self.is_decider if half == "decide" else ~self.is_decider

    def shuffled(self, tokenizer: Any, seed: int) -> "HeldOutUnits":
        """Return the same units with their words in another order, of text without spaces its characters.

        Args:
            tokenizer: The model's.
            seed: Of the orders.
        """
        draws = np.random.default_rng(seed)
        texts = [shuffle_words(text, draws) for text in self.texts]
        documents = with_start(encode_documents(texts, tokenizer), tokenizer)
        return dataclasses.replace(self, texts=texts, documents=documents)


def _too_few(name: str, num_units: int, num_bytes: int, num_there: int) -> str:
    """What is missing, and where it can come from: of the text itself where that was shortened, else of the user."""
    passages = 2 * LEAST_UNITS
    wanted = passages * _LEAST_BYTES
    needed = f"expected {passages} or more, about {wanted:,} bytes; with fewer no loss can be told from chance"
    if num_bytes < num_there >= wanted:
        return f"eval_bytes: got {num_units} passages of the held-out {name}, {num_bytes:,} bytes, {needed}"
    return f"data: got {num_units} held-out passages of {name}, {num_there:,} bytes, {needed}; mark more as validation"


def cut_passages(text: str, num_bytes: int) -> list[str]:
    """Return a text in passages, cut behind lines, or where one is long behind spaces; joined they are the text.

    Args:
        text: Of any length.
        num_bytes: UTF-8 bytes of a passage, about.
    """
    pieces, size = [""], 0
    for line in text.splitlines(keepends=True):
        for part in _cut_line(line, num_bytes):
            length = len(part.encode())
            if size + length // 2 >= num_bytes and pieces[-1].strip():
                pieces.append("")
                size = 0
            pieces[-1] += part
            size += length
    return [piece for piece in pieces if piece.strip()]


def _cut_line(line: str, num_bytes: int) -> list[str]:
    parts = []
    while len(encoded := line.encode()) > num_bytes:
        most = len(encoded[:num_bytes].decode(errors="ignore"))
        space = line.rfind(" ", most // 2, most)
        end = space + 1 if space > 0 else most
        parts.append(line[:end])
        line = line[end:]
    return [*parts, line]


def shuffle_words(text: str, draws: np.random.Generator) -> str:
    """Return a text with its words, or where there are hardly spaces its characters, in another order.

    Args:
        text: Of any script.
        draws: The order.
    """
    words = text.split()
    parts, glue = (words, " ") if len(text) < 10 * len(words) else (list(text), "")
    return glue.join(parts[place] for place in draws.permutation(len(parts)))
