"""A text data set as a stage trains on it: its documents in two splits, in memory or on disk."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_records.row_files import WrongEncodingError
from deepseek_records.summary import DataUse
from deepseek_training.data.mapped_texts import Documents, read_documents
from deepseek_training.data.overlap import check_overlap
from deepseek_training.data.texts import data_name, describe_data
from deepseek_training.recipes.text_sources import TextSource, text_sources


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text data set, split.

    Attributes:
        source: As the user named it.
        train: Documents to train on.
        validation: Held-out documents; none where the source says so.
        settings: How the recipe describes it.
        hashes: Of both splits' documents, the first 64 bits of their SHA-256.
    """

    source: str
    train: Sequence[str]
    validation: Sequence[str]
    settings: TextSource
    hashes: tuple[np.ndarray, np.ndarray]

    @classmethod
    def load(cls, name_or_path: str, column: str | None = None) -> "Corpus":
        """Return both splits of a source, as `load_texts` reads them."""
        return cls.read(TextSource(path=name_or_path, column=column))

    @classmethod
    def read(cls, settings: TextSource, encoding: str = "utf-8") -> "Corpus":
        """Return both splits of a source.

        Args:
            settings: Which, and how it is read.
            encoding: Of its files, where the settings name none.

        Raises:
            FileNotFoundError: Nothing lies there.
            ValueError: As for `load_texts`; or a split has no document.
        """

        def read(path: str) -> Documents:
            try:
                return read_documents(path, column=settings.column, encoding=settings.encoding or encoding)
            except WrongEncodingError as error:
                raise ValueError(f"{error}; set encoding") from None

        documents = read(settings.path)
        if settings.validation is not None:
            held_out = read(settings.validation)
            held_texts, held_hashes = held_out.choose("validation" if any(held_out.splits) else "all")
            train, hashes = documents.choose("train" if any(documents.splits) else "all")
        elif settings.validation_share == 0:
            (train, hashes), held_texts, held_hashes = documents.choose("all"), [], np.zeros(0, np.uint64)
        else:
            train, hashes = documents.choose("train", settings.validation_share)
            held_texts, held_hashes = documents.choose("validation", settings.validation_share)
        return cls(settings.path, train, held_texts, settings, (hashes, held_hashes))

    @property
    def name(self) -> str:
        """As figures carry it."""
        return self.settings.name or data_name(self.source)


def load_corpora(
    data: str | list[dict[str, Any]], setting_name: str, *, column: str | None, encoding: str
) -> list[Corpus]:
    """Return the sources of a recipe's setting.

    Args:
        data: The setting's value: one source, or a list of mappings.
        setting_name: The setting, for errors.
        column: The column that holds the text, where a source names none.
        encoding: Likewise.

    Raises:
        FileNotFoundError: A source is missing.
        ValueError: A source cannot be used, or nothing is held out.
    """
    corpora = [Corpus.read(source, encoding) for source in text_sources(data, setting_name, column)]
    if not any(len(corpus.validation) for corpus in corpora):
        raise ValueError(f"{setting_name}: got no held-out text, expected some; set validation or validation_share")
    return corpora


def check_corpora(corpora: Sequence[Corpus]) -> None:
    """Refuse a mixture in which a text is trained on and held out.

    A single source without `validation` is what its own splits make of it.

    Args:
        corpora: Of all settings.

    Raises:
        ValueError: A held-out text is also trained on.
    """
    if len(corpora) == 1 and corpora[0].settings.validation is None:
        return
    for held_out in corpora:
        check_overlap(held_out, corpora, is_near=held_out.settings.validation is not None)


def distinct_names(corpora: Sequence[Corpus]) -> list[str]:
    """Return a name for each data set; where two would be equal, all get their folder in front.

    Args:
        corpora: The data sets.

    Raises:
        ValueError: They are equal even so.
    """
    names = [corpus.name for corpus in corpora]
    if len(set(names)) < len(names):
        names = [one.settings.name or f"{Path(one.source).absolute().parent.name}-{one.name}" for one in corpora]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"data: got two sources of the name {twice!r}, expected different ones; set name")
    return names


def describe_corpora(corpora: Sequence[Corpus], evaluated: Sequence[Sequence[str]]) -> tuple[DataUse, ...]:
    """Return the summary's lines on what a stage trained on and what it was measured on.

    Args:
        corpora: The data sets.
        evaluated: Of each the held-out texts that were scored; none where nothing was held out.
    """
    train = [_describe(corpus, corpus.source, "train", corpus.train) for corpus in corpora]
    held_out = [
        _describe(corpus, corpus.settings.validation or corpus.source, "validation", texts)
        for corpus, texts in zip(corpora, evaluated, strict=True)
        if len(texts)
    ]
    return (*train, *held_out)


def _describe(corpus: Corpus, source: str, split: str, texts: Sequence[str]) -> DataUse:
    found = describe_data(source, split, texts, "training" if split == "train" else "evaluation")
    settings = corpus.settings
    return dataclasses.replace(
        found,
        license=settings.license or found.license,
        languages=tuple(settings.languages) or found.languages,
    )
