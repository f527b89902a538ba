"""Passages of equal length out of each domain's documents, so that domains weigh the same whatever their size.

Errors count documents: passages of one document are alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from deepseek_records.document_tokens import start_of_text
from deepseek_records.user_text import encode_documents_plainly

# Characters that surely hold one token more than is kept of them.
_CHARACTERS_PER_TOKEN = 8


@dataclass(frozen=True)
class Passage:
    """A stretch of a document.

    Attributes:
        domain: The data set's name.
        document: Number over all domains, the same for passages of one document.
        token_ids: `[S]` int64, the begin token in front.
    """

    domain: str
    document: int
    token_ids: np.ndarray


def cut_passages(
    domains: Mapping[str, Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_passages: int,
    length: int,
    seed: int = 0,
) -> list[Passage]:
    """Return up to `num_passages` passages of each domain, from as many documents as possible, without overlap.

    Args:
        domains: Documents by the domain's name.
        tokenizer: The model's.
        num_passages: Per domain.
        length: Tokens of a passage at most, the begin token included.
        seed: Which documents and places.

    Raises:
        ValueError: A domain gives no passage of two tokens.
    """
    start, passages, first = start_of_text(tokenizer), [], 0
    for name, texts in domains.items():
        places = _choose_places([len(text) for text in texts], num_passages, length * _CHARACTERS_PER_TOKEN, seed)
        pieces = [texts[document][begin : begin + length * _CHARACTERS_PER_TOKEN] for document, begin in places]
        kept = [
            Passage(name, first + document, np.array([*start, *ids][:length], dtype=np.int64))
            for (document, _), ids in zip(places, encode_documents_plainly(pieces, tokenizer), strict=True)
            if len(ids) > 1
        ]
        if not kept:
            raise ValueError(f"data: got no text of two tokens in {name}, expected documents")
        passages += kept
        first += len(texts)
    return passages


def _choose_places(lengths: Sequence[int], number: int, width: int, seed: int) -> list[tuple[int, int]]:
    """Document and first character of each passage: all documents once before any a second time."""
    rng = np.random.default_rng(seed)
    slots = [list(rng.permutation(max(1, length // width))) for length in lengths]
    places: list[tuple[int, int]] = []
    order = rng.permutation(len(lengths))
    while len(places) < number and any(slots):
        for document in order:
            if slots[document] and len(places) < number:
                places.append((int(document), int(slots[document].pop()) * width))
    return places


def make_batch(passages: Sequence[Passage]) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids `[B, S]` padded on the right, and which of them are tokens, `[B, S]` bool.

    Args:
        passages: B passages. Causal attention cannot see the padding.
    """
    longest = max(len(passage.token_ids) for passage in passages)
    ids: np.ndarray = np.zeros((len(passages), longest), dtype=np.int64)
    is_token: np.ndarray = np.zeros(ids.shape, dtype=bool)
    for row, passage in enumerate(passages):
        ids[row, : len(passage.token_ids)] = passage.token_ids
        is_token[row, : len(passage.token_ids)] = True
    return ids, is_token
