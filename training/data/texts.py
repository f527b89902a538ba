"""Texts to train on, from wherever the user has them.

`load_texts` is the one way in for every stage: an embedded name, a text, JSONL or Parquet file, a folder of them, a
``datasets`` directory or a Hub id. A plain text file is cut at blank lines into passages, so that one long
file can still be split; and without a ``split`` column the split is by a hash of the document, so that it stays the
same when documents are added or reordered.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from deepseek_records.row_files import TABLE_SUFFIXES, is_hub_id, load_hub_data, read_lines, read_table, suffix_of
from deepseek_records.summary import DataUse
from deepseek_training.data.folders import data_files

UsedFor = Literal["training", "evaluation"]
DATA_FOLDER = Path(__file__).parent
SPLITS = ("train", "validation", "all")
VALIDATION_SHARE = 10  # one document in ten
_PASSAGE_CHARACTERS = 2000
_TEXT_SUFFIXES = {".txt", ".md", ".text"}
_SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev", "eval", "test"), "train": ("train",)}


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
    "dialogues": EmbeddedData(
        "dialogues.jsonl.gz",
        "prompt",
        "CC BY 4.0 (MedQuAD, Taskmaster-4), MIT (HH-RLHF)",
        "github.com/abachaa/MedQuAD, github.com/anthropics/hh-rlhf, github.com/google-research-datasets/Taskmaster",
    ),
    "dialogues_zh": EmbeddedData("dialogues_zh.jsonl.gz", "prompt", "Apache-2.0", "github.com/hiyouga/LLaMA-Factory"),
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A text data set, split.

    Attributes:
        source: As the user named it.
        train: Documents to train on.
        validation: Held-out documents.
    """

    source: str
    train: list[str]
    validation: list[str]

    @classmethod
    def load(cls, name_or_path: str, column: str | None = None) -> "Corpus":
        """Return both splits of what `load_texts` reads."""
        return cls(name_or_path, *(load_texts(name_or_path, split, column=column) for split in SPLITS[:2]))


def data_name(name_or_path: str) -> str:
    """Return a data set's name as figures carry it: an embedded name, or the last part of a path or Hub id."""
    return Path(name_or_path).name.split(".")[0]


def distinct_names(*sources: str) -> list[str]:
    """Return a name for each data set; where two would be equal, both get their folder in front."""
    names = [data_name(source) for source in sources]
    if len(set(names)) == len(names):
        return names
    return [f"{Path(source).absolute().parent.name}-{name}" for source, name in zip(sources, names, strict=True)]


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
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)}")
    return _select_split(list(read_rows(name_or_path, split, column=column, is_chat=is_chat)), split, name_or_path)


def read_rows(
    name_or_path: str | Path, split: str = "all", *, column: str | None = None, is_chat: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield rows with at least ``text`` (the chosen column, a string) before any split is made.

    Args:
        name_or_path: As for `load_texts`.
        split: Used only to open the right part of a `datasets` directory or Hub data set.
        column: As for `load_texts`.
        is_chat: As for `load_texts`.

    Raises:
        FileNotFoundError: Nothing lies there.
        ValueError: Empty, not text, no such column, or a Hub id without network.
    """
    name = str(name_or_path)
    if name in EMBEDDED:
        column = column or EMBEDDED[name].column
    for row in _raw_rows(name, split):
        default = "prompt" if "prompt" in row and "text" not in row else "text"
        yield {**row, "text": _pick_column(row, column or default, name, is_chat=is_chat)}


def has_column(name_or_path: str | Path, column: str) -> bool:
    """Return whether the first row has a column.

    Args:
        name_or_path: As for `load_texts`.
        column: The column.
    """
    return column in next(_raw_rows(str(name_or_path), "all"), {})


def _raw_rows(name: str, split: str) -> Iterator[dict[str, Any]]:
    if name in EMBEDDED:
        return _read_file(DATA_FOLDER / EMBEDDED[name].file)
    return _read_path(Path(name), split) if Path(name).exists() else _read_hub(name, split)


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
    return DataUse(
        name=Path(name).name if local else name,
        license=embedded.license if embedded else "not stated",
        source=embedded.source if embedded else ("local files" if local else f"huggingface.co/datasets/{name}"),
        split=split,
        num_rows=len(texts),
        num_bytes=sum(len(text.encode()) for text in texts),
        used_for=used_for,
        hub_id=None if embedded or local else name.partition(":")[0],
        languages=embedded.languages if embedded else (),
    )


def describe_corpora(corpora: Sequence[Corpus], evaluated: Sequence[Sequence[str]]) -> tuple[DataUse, ...]:
    """Return the summary's lines on what a stage trained on and what it was measured on.

    Args:
        corpora: The data sets.
        evaluated: Of each the held-out texts that were scored.
    """
    train = [describe_data(corpus.source, "train", corpus.train, "training") for corpus in corpora]
    pairs = zip(corpora, evaluated, strict=True)
    return (*train, *(describe_data(corpus.source, "validation", texts, "evaluation") for corpus, texts in pairs))


def is_validation(text: str) -> bool:
    """Return whether the hash split puts this document into the validation part."""
    return _hash(text) % VALIDATION_SHARE == 0


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def _select_split(rows: list[dict[str, Any]], split: str, name: str | Path) -> list[str]:
    rows = [row for row in rows if row["text"].strip()]
    if not rows:
        raise ValueError(f"data: {name} is empty; it holds no text")
    if split == "all":
        return [row["text"] for row in rows]
    if any(row.get("split") for row in rows):
        chosen = [row["text"] for row in rows if row.get("split") in _SPLIT_NAMES[split]]
        if not chosen:
            found = ", ".join(sorted({str(row.get("split")) for row in rows}))
            raise ValueError(f"data: {name} has no row with split '{split}' (its column 'split' holds: {found})")
        return chosen
    held_out = {index for index, row in enumerate(rows) if is_validation(row["text"])}
    if not held_out and len(rows) > 1:  # a small set still gets one held-out document, the one with the least hash
        held_out = {min(range(len(rows)), key=lambda index: _hash(rows[index]["text"]))}
    chosen = [row["text"] for index, row in enumerate(rows) if (index in held_out) == (split == "validation")]
    if not chosen:
        raise ValueError(f"data: {name} has {len(rows)} document(s), too few for a {split} split; add more documents")
    return chosen


def _pick_column(row: dict[str, Any], column: str, name: str, *, is_chat: bool) -> str:
    if column not in row:
        found = ", ".join(row)
        raise ValueError(f"data: {name} has no column '{column}' (it has: {found}); name one of them")
    if is_chat and is_messages(row[column]):
        return json.dumps(row[column], ensure_ascii=False, sort_keys=True)
    if not isinstance(row[column], str):
        kind = type(row[column]).__name__
        raise ValueError(f"data: column '{column}' of {name} holds {kind}, not text")
    return row[column]


def is_messages(value: Any) -> bool:
    """Return whether a value is a conversation: a list of messages with a role each."""
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) and "role" in one for one in value)


def _read_path(path: Path, split: str) -> Iterator[dict[str, Any]]:
    if path.is_file():
        return _read_file(path)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _read_saved(path, split)
    files = data_files(path, _TEXT_SUFFIXES | TABLE_SUFFIXES)
    return (row if part is None else {**row, "split": part} for file, part in files for row in _read_file(file))


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(f"data: no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"data: {path} is empty")
    if suffix_of(path) in TABLE_SUFFIXES:
        yield from (row for row, _ in read_table(path))
    elif suffix_of(path) in (".tsv", ".json"):  # whoever has one means its rows, not its tabs and brackets
        raise ValueError(
            f"data: {path}: got {suffix_of(path)}, expected text, .jsonl (an object per line), .csv or .parquet"
        )
    else:
        for passage in _cut_passages("".join(read_lines(path, newline=""))):
            yield {"text": passage}


def _cut_passages(text: str) -> Iterator[str]:
    """Yield passages of at least `_PASSAGE_CHARACTERS`; joined they are the text again.

    They are cut at blank lines, and at the end of a line where no blank one has come for long.
    """
    start = 0
    for blank in re.finditer(r"\n\s*\n|\n", text):
        is_blank_line = blank.group().count("\n") > 1
        if blank.end() - start >= _PASSAGE_CHARACTERS * (1 if is_blank_line else 4):
            yield text[start : blank.end()]
            start = blank.end()
    if text[start:]:
        yield text[start:]


def _read_saved(path: Path, split: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (FileNotFoundError, ValueError, OSError):
        raise ValueError(f"data: {path} is not a whole `datasets` directory") from None
    return _rows_of(data, split)


def _rows_of(data: Any, split: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Dataset or DatasetDict; where the dict has named splits each row says its own."""
    import datasets

    if isinstance(data, datasets.Dataset):
        yield from data
        return
    has_validation = any(name in data for name in _SPLIT_NAMES["validation"])
    for part, rows in data.items():
        if split == "all" or part in _SPLIT_NAMES[split] or not has_validation:
            yield from ({**row, "split": part} if has_validation else row for row in rows)


def _read_hub(name: str, split: str) -> Iterator[dict[str, Any]]:
    known = ", ".join(EMBEDDED)
    if not is_hub_id(name):
        raise FileNotFoundError(f"data: no file or folder {name} (embedded names: {known})")
    instead = f"an embedded name ({known}), a .txt, .jsonl, .csv or .parquet file, or a folder of them"
    return _rows_of(load_hub_data(name, instead), split)
