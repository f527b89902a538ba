"""Held-out text by how often the training text names its words and entities: what a model makes of the long tail.

Words of four letters or more (of Chinese each character) and the topics that the text's own structure names are put
into the bands of `balance.BANDS`, by the number of training documents that hold them; words in more than a third of
the documents say nothing of a subject and are left out. `tail_figures` makes gaps and drops of what is counted here.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from deepseek_records.document_tokens import start_of_text
from deepseek_training.knowledge.balance import BANDS, band_of
from deepseek_training.knowledge.extract import topic_terms
from deepseek_training.knowledge.passages import cut_rows
from deepseek_training.knowledge.vocabulary import Vocabulary

_FUNCTION_WORD_SHARE = 1 / 3
_WORD = re.compile(r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]{4,}")
_BATCH_SIZE = 16
Named = Iterator[tuple[str, int, int]]


@dataclasses.dataclass(frozen=True)
class Span:
    """A word or entity in a document.

    Attributes:
        begin: Its first character.
        end: One past its last.
        band: Which of `BANDS`.
    """

    begin: int
    end: int
    band: int


@dataclasses.dataclass(frozen=True)
class TailText:
    """Held-out documents with their words and entities.

    Attributes:
        texts: The documents.
        spans: By kind (``words``, ``entities``), those of each document.
    """

    texts: Sequence[str]
    spans: Mapping[str, Sequence[Sequence[Span]]]

    @classmethod
    def prepare(cls, train: Sequence[str], held_out: Sequence[str]) -> "TailText":
        """Return the held-out documents, banded by the training text.

        Args:
            train: Documents trained on.
            held_out: Others.
        """
        rows = ({"text": text} for text in (*train, *held_out))
        topics = Vocabulary(topic_terms(cut_rows(rows, "data")))
        kinds: dict[str, Callable[[str], Named]] = {"words": find_words}
        if topics.terms:
            kinds["entities"] = lambda text: ((one.term, one.begin, one.end) for one in topics.find(text))
        spans = {name: _band(find, train, held_out, is_word=name == "words") for name, find in kinds.items()}
        return cls(held_out, {name: found for name, found in spans.items() if any(found)})


def find_words(text: str) -> Named:
    """Yield the words of a text in lower case, with where they stand.

    Args:
        text: A document.
    """
    for match in _WORD.finditer(text):
        yield match[0].lower(), match.start(), match.end()


def _band(
    find: Callable[[str], Named], train: Sequence[str], held_out: Sequence[str], *, is_word: bool
) -> list[list[Span]]:
    counts: Counter[str] = Counter()
    for text in train:
        counts.update({name for name, _, _ in find(text)})
    most = _FUNCTION_WORD_SHARE * len(train) if is_word else len(train)
    names = list(BANDS)
    return [
        [
            Span(begin, end, names.index(band_of(counts[name])))
            for name, begin, end in find(text)
            if counts[name] <= most
        ]
        for text in held_out
    ]


@dataclasses.dataclass(frozen=True)
class TailCounts:
    """What one model makes of one kind, `[documents, bands]` float64.

    Attributes:
        bits: Bits of the tokens.
        num_bytes: UTF-8 bytes of the words.
        hits: Tokens that were the likeliest.
        num_tokens: Tokens.
    """

    bits: np.ndarray
    num_bytes: np.ndarray
    hits: np.ndarray
    num_tokens: np.ndarray

    @classmethod
    def empty(cls, num_documents: int) -> "TailCounts":
        """Return zeros."""
        return cls(*(np.zeros((num_documents, len(BANDS))) for _ in range(4)))


def measure_tail(model: Any, tokenizer: Any, tail: TailText, *, sequence_length: int) -> dict[str, TailCounts]:
    """Return what a model makes of each kind.

    Args:
        model: A causal language model; its mode is left as it was.
        tokenizer: Its tokenizer, which must tell where tokens stand.
        tail: The text.
        sequence_length: Tokens that the model sees at once.

    Raises:
        ValueError: The tokenizer does not tell where tokens stand.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"long_tail: got {type(tokenizer).__name__}, expected a tokenizer that tells tokens' places")
    found = {kind: TailCounts.empty(len(tail.texts)) for kind in tail.spans}
    places = []
    documents: list[list[int]] = []
    for text in tail.texts:
        encoded = tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        documents.append([*start_of_text(tokenizer), *encoded["input_ids"]])
        places.append(np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2))
    for number, (bits, hits) in enumerate(_score(model, documents, sequence_length)):
        begins, ends = places[number][:, 0], places[number][:, 1]
        for kind, counts in found.items():
            for span in tail.spans[kind][number]:
                first, last = np.searchsorted(ends, span.begin, "right"), np.searchsorted(begins, span.end, "left")
                counts.bits[number, span.band] += bits[first:last].sum()
                counts.hits[number, span.band] += hits[first:last].sum()
                counts.num_tokens[number, span.band] += last - first
                counts.num_bytes[number, span.band] += len(tail.texts[number][span.begin : span.end].encode())
    return found


@torch.no_grad()
def _score(model: Any, documents: Sequence[list[int]], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each document, bits and whether it was the likeliest, of every token but the first."""
    device = next(model.parameters()).device
    windows = [
        (number, ids[begin : begin + length])
        for number, ids in enumerate(documents)
        for begin in range(0, len(ids) - 1, length - 1)
    ]
    was_training = model.training
    model.eval()
    parts: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in documents]
    try:
        for start in range(0, len(windows), _BATCH_SIZE):
            batch = windows[start : start + _BATCH_SIZE]
            inputs = torch.zeros(len(batch), max(len(ids) for _, ids in batch), dtype=torch.long)
            for row, (_, ids) in enumerate(batch):
                inputs[row, : len(ids)] = torch.tensor(ids)  # padding on the right, unseen
            inputs = inputs.to(device)
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), inputs[:, 1:], reduction="none")
            bits = (losses.double() / np.log(2)).cpu().numpy()
            hits = (logits.argmax(-1) == inputs[:, 1:]).double().cpu().numpy()
            for row, (number, ids) in enumerate(batch):
                parts[number].append((bits[row, : len(ids) - 1], hits[row, : len(ids) - 1]))
    finally:
        model.train(was_training)
    nothing = (np.zeros(0), np.zeros(0))
    for found in parts:
        pairs = found or [nothing]
        yield np.concatenate([one[0] for one in pairs]), np.concatenate([one[1] for one in pairs])
