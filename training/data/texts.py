"""Texts to train on, from wherever the user has them.

`load_texts` is the one way in for every stage: an embedded name, or what `deepseek_records.document_files` reads.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from deepseek_records.cleaned_data import describe_cleaning, find_cleaning
from deepseek_records.document_files import (
    SPLITS,
    TEXT_SUFFIXES,
    default_column,
    pick_text,
    read_document_file,
    read_documents,
    select_split,
)
from deepseek_records.row_files import suffix_of
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import DataUse

UsedFor = Literal["training", "evaluation"]
DATA_FOLDER = Path(__file__).parent


@dataclasses.dataclass(frozen=True)
class EmbeddedData:
    """A data set that ships with the package; ``data/SOURCES.md`` tells what was changed.

    Args:
        file: File name under ``data/``.
        column: The column that holds the text.
        license: Its license.
        source: Where it comes from.
        languages: ISO 639 codes of its texts.
    """

    file: str
    column: str
    license: str
    source: str
    languages: tuple[str, ...] = ("en",)


EMBEDDED = {
    "books": EmbeddedData("books.jsonl.gz", "text", "public domain", "github.com/mlschmitt/classic-books-markdown"),
    "medicine": EmbeddedData(
        "medicine.jsonl.gz",
        "text",
        "MIT (PubMedQA), CC BY 4.0 (MedQuAD)",
        "github.com/pubmedqa/pubmedqa, github.com/abachaa/MedQuAD",
    ),
    "finance": EmbeddedData("finance.jsonl.gz", "text", "MIT", "github.com/NExTplusplus/TAT-QA"),
    "prose_zh": EmbeddedData("prose_zh.jsonl.gz", "text", "MIT", "github.com/NiuTrans/Classical-Modern", ("zh",)),
    "dialogues": EmbeddedData(
        "dialogues.jsonl.gz",
        "prompt",
        "CC BY 4.0 (MedQuAD, Taskmaster-4), MIT (HH-RLHF)",
        "github.com/abachaa/MedQuAD, github.com/anthropics/hh-rlhf, github.com/google-research-datasets/Taskmaster",
    ),
    "dialogues_zh": EmbeddedData("dialogues_zh.jsonl.gz", "prompt", "Apache-2.0", "github.com/hiyouga/LLaMA-Factory"),
}


def data_name(name_or_path: str) -> str:
    """Return a data set's name as figures carry it: an embedded name, or the last part of a path or Hub id."""
    return Path(name_or_path).name.split(".")[0]


def load_texts(
    name_or_path: str | Path, split: str = "train", *, column: str | None = None, is_chat: bool = False
) -> list[str]:
    """Return the non-empty texts of one split, in order.

    Args:
        name_or_path: ``books``, ``medicine`` or ``dialogues``; a .txt, .md, .jsonl or .parquet file (also .gz); a
            folder of such files, with splits in their names as on the Hub; a directory written by ``datasets``'
            ``save_to_disk``; or a Hub id (``owner/name`` or ``owner/name:configuration``).
        split: ``train``, ``validation`` or ``all``. Rows with a ``split`` column keep theirs; otherwise one document
            in ten is validation, chosen by a hash of its text.
        column: The column with the text; by default ``text``, or ``prompt`` where there is no ``text`` and for
            ``dialogues``.

        is_chat: Also take a column of chat messages, whose text is their JSON.

    Raises:
        FileNotFoundError: Nothing lies there.
        ValueError: Empty, not text, no such column, no such split, or a Hub id without network.
    """
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
    return select_split(list(read_rows(name_or_path, split, column=column, is_chat=is_chat)), split, name_or_path)


def read_rows(
    name_or_path: str | Path,
    split: str = "all",
    *,
    column: str | None = None,
    is_chat: bool = False,
    encoding: str = "utf-8",
) -> Iterator[dict[str, Any]]:
    """Yield rows with at least ``text`` (the chosen column, a string) before any split is made.

    Args:
        name_or_path: As for `load_texts`.
        split: Used only to open the right part of a `datasets` directory or Hub data set.
        column: As for `load_texts`.
        is_chat: As for `load_texts`.
        encoding: Of all files but Parquet.

    Raises:
        FileNotFoundError: Nothing lies there.
        ValueError: Empty, not text, no such column, or a Hub id without network.
    """
    name = str(name_or_path)
    if name in EMBEDDED:
        column = column or EMBEDDED[name].column
    for row, file in _raw_rows(name, split, encoding):
        own = None if suffix_of(Path(file)) in TEXT_SUFFIXES else column  # plain text has no columns
        yield {**row, "text": pick_text(row, own or default_column(row), file, is_chat=is_chat)}


def has_column(name_or_path: str | Path, column: str) -> bool:
    """Return whether the first row has a column.

    Args:
        name_or_path: As for `load_texts`.
        column: The column.
    """
    return column in next(_raw_rows(str(name_or_path), "all"), ({}, ""))[0]


def _raw_rows(name: str, split: str, encoding: str = "utf-8") -> Iterator[tuple[dict[str, Any], str]]:
    if name in EMBEDDED:
        return ((row, name) for row in read_document_file(DATA_FOLDER / EMBEDDED[name].file))
    return read_documents(name, split, tuple(EMBEDDED), encoding)


def describe_data(name_or_path: str | Path, split: str, texts: Sequence[str], used_for: UsedFor) -> DataUse:
    """Return the summary's line on one data set: name, license, source, split, rows and bytes.

    Args:
        name_or_path: As given to `load_texts`.
        split: The split the texts are of.
        texts: What was loaded.
        used_for: ``training`` or ``evaluation``.
    """
    name = str(name_or_path)
    embedded = EMBEDDED.get(name)
    local = Path(name).exists() and not embedded
    if local and (run := find_cleaning(name)) is not None:
        return _describe_cleaned(run, Path(name).name, split, texts, used_for)
    return DataUse(
        name=Path(name).name if local else name,
        license=embedded.license if embedded else "not stated",
        source=embedded.source if embedded else ("local files" if local else f"huggingface.co/datasets/{name}"),
        split=split,
        num_rows=len(texts),
        num_bytes=count_bytes(texts),
        used_for=used_for,
        hub_id=None if embedded or local else name.partition(":")[0],
        languages=embedded.languages if embedded else (),
    )


def count_bytes(texts: Sequence[str]) -> int:
    """Return the UTF-8 bytes of texts.

    Args:
        texts: In memory, or mapped ones, which know it.
    """
    known = getattr(texts, "num_bytes", None)
    return sum(len(text.encode()) for text in texts) if known is None else int(known)


def _describe_cleaned(run: RunFolder, name: str, split: str, texts: Sequence[str], used_for: UsedFor) -> DataUse:
    """Of cleaned text, whose run knows licenses, sources and languages."""
    cleaning = describe_cleaning(run)
    parts = [one for one in cleaning.sources if split in ("all", one.split)]
    return DataUse(
        name=name,
        license="; ".join(dict.fromkeys(one.license for one in parts)) or "not stated",
        source="; ".join(dict.fromkeys(one.source for one in parts)) or "not stated",
        split=split,
        num_rows=len(texts),
        num_bytes=count_bytes(texts),
        used_for=used_for,
        languages=tuple(dict.fromkeys(code for one in parts for code in one.languages)),
        cleaning=cleaning,
    )
