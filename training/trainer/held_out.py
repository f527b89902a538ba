"""Held-out sets as the stages score them, and the figures that come of it."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from deepseek_records.document_tokens import with_start
from deepseek_training.data.corpus import Corpus, distinct_names
from deepseek_training.data.packing import cut_to_share, encode_documents
from deepseek_training.data.texts import count_bytes
from deepseek_training.recipes.pretrain_and_adapt import TrainerSettings
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.recipes.shrink import ShrinkSettings
from deepseek_training.recipes.upcycle import UpcycleSettings
from deepseek_training.trainer.bigram import BigramModel
from deepseek_training.trainer.bits_per_byte import BitsPerByte, measure_bigram, measure_model


class HeldOutSet(Protocol):
    """A held-out set that a stage can score."""

    @property
    def name(self) -> str:
        """As it appears in the figures."""

    @property
    def rows(self) -> Sequence[Any]:
        """What it consists of, as JSON takes it."""

    def measure(self, model: Any, recipe: TrainerSettings) -> BitsPerByte:
        """Return the model's bits per byte on this set."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out documents.

    Attributes:
        name: As it appears in the figures.
        texts: The texts.
        documents: Their tokens.
        num_bytes: Their UTF-8 bytes.
    """

    name: str
    texts: Sequence[str]
    documents: Sequence[np.ndarray]
    num_bytes: int

    @classmethod
    def prepare(cls, name: str, texts: Sequence[str], tokenizer: Any, max_bytes: int | None) -> "HeldOut":
        """Return the set, shortened to `max_bytes` and encoded."""
        texts = cut_to_share(texts, max_bytes)
        documents = with_start(encode_documents(texts, tokenizer), tokenizer)
        return cls(name, texts, documents, count_bytes(texts))

    @property
    def rows(self) -> Sequence[Any]:
        """The texts, under the name that each held-out set has for its content."""
        return self.texts

    def measure(
        self, model: Any, recipe: TrainerSettings | ShrinkSettings | QuantizeSettings | UpcycleSettings
    ) -> BitsPerByte:
        """Return the model's bits per byte on this set."""
        return measure_model(
            model,
            self.documents,
            self.num_bytes,
            sequence_length=recipe.sequence_length,
            batch_size=recipe.batch_size,
        )

    def measure_bigram(self, bigram: BigramModel, recipe: TrainerSettings) -> BitsPerByte:
        """Return a bigram's bits per byte on this set."""
        return measure_bigram(bigram, self.documents, self.num_bytes, sequence_length=recipe.sequence_length)


def prepare_all(corpora: Sequence[Corpus], tokenizer: Any, max_bytes: int | None) -> list[HeldOut]:
    """Return the held-out sets of all corpora that have one.

    Args:
        corpora: The data sets.
        tokenizer: What they are encoded with.
        max_bytes: To which each is shortened; None keeps all.
    """
    return [
        HeldOut.prepare(name, corpus.validation, tokenizer, max_bytes)
        for name, corpus in zip(distinct_names(corpora), corpora, strict=True)
        if len(corpus.validation)
    ]


def scored_texts(corpora: Sequence[Corpus], held_out: Sequence[HeldOut]) -> list[Sequence[str]]:
    """Return of each corpus the held-out texts that are scored; none of a corpus without.

    Args:
        corpora: The data sets.
        held_out: From `prepare_all`.
    """
    sets = iter(held_out)
    return [next(sets).texts if len(corpus.validation) else [] for corpus in corpora]


def sizes_of(corpora: Sequence[Corpus], held_out: Sequence[HeldOut]) -> list[tuple[str, int, int]]:
    """Return name, documents to train on and held-out documents of each corpus.

    Args:
        corpora: The data sets.
        held_out: From `prepare_all`.
    """
    scored = scored_texts(corpora, held_out)
    return [
        (name, len(corpus.train), len(texts))
        for name, corpus, texts in zip(distinct_names(corpora), corpora, scored, strict=True)
    ]


def measure_sets(held_out: Iterable[HeldOutSet], model: Any, recipe: TrainerSettings) -> dict[str, BitsPerByte]:
    """Return the model's bits per byte on each set, by the set's name."""
    return {one.name: one.measure(model, recipe) for one in held_out}


def bits_figures(measured: dict[str, BitsPerByte]) -> dict[str, float]:
    """Return ``eval_<name>_bits_per_byte`` of each set, as the log carries it."""
    return {f"eval_{name}_bits_per_byte": value.value for name, value in measured.items()}
