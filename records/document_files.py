"""Documents from a user's files, folders and Hub data sets, as the training stages read them and evaluation does.

A plain text file is cut at blank lines into passages, so that one long file can still be split; and without a
``split`` column the split is by a hash of the document, so that it stays the same when documents are added or
reordered.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_records.data_folders import data_files
from deepseek_records.row_files import TABLE_SUFFIXES, is_hub_id, load_hub_data, read_lines, read_table, suffix_of

SPLITS = ("train", "validation", "all")
VALIDATION_SHARE = 10  # one document in ten
_PASSAGE_CHARACTERS = 2000
_TEXT_SUFFIXES = {".txt", ".md", ".text"}
_SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev", "eval", "test"), "train": ("train",)}


def load_documents(source: str | Path, split: str = "all", *, column: str | None = None) -> list[str]:
    """Return the non-empty texts of one split, in order.

    Args:
        source: A file, a folder or a Hub id, as `read_documents` takes it.
        split: ``train``, ``validation`` or ``all``. Rows with a ``split`` column keep theirs; otherwise one document
            in ten is validation, chosen by a hash of its text.
        column: The column with the text; by default ``text``, or ``prompt`` where there is no ``text``.

    Raises:
        FileNotFoundError: Nothing lies there.
        ValueError: Empty, not text, no such column, no such split, or a Hub id without network.
    """
    rows = []
    for row in read_documents(source, split):
        rows.append({**row, "text": pick_text(row, column or default_column(row), str(source))})
    return select_split(rows, split, source)


def read_documents(source: str | Path, split: str, others: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a text, JSONL, CSV or Parquet file (also .gz), a folder, a ``datasets`` directory or a Hub id.

    Args:
        source: Which.
        split: Used only to open the right part of a `datasets` directory or Hub data set.
        others: Names that could have been given, too, for errors.

    Raises:
        FileNotFoundError: Nothing lies there.
        ValueError: Empty, not text, or a Hub id without network.
    """
    if Path(source).exists():
        return _read_path(Path(source), split)
    known = f" (embedded names: {', '.join(others)})" if others else ""
    if not is_hub_id(str(source)):
        raise FileNotFoundError(f"data: no file or folder {source}{known}")
    embedded = f"an embedded name ({', '.join(others)}), " if others else ""
    instead = f"{embedded}a .txt, .jsonl, .csv or .parquet file, or a folder of them"
    return _rows_of(load_hub_data(str(source), instead), split)


def default_column(row: dict[str, Any]) -> str:
    """Return the column that holds a row's text, where none is named."""
    return "prompt" if "prompt" in row and "text" not in row else "text"


def is_validation(text: str) -> bool:
    """Return whether the hash split puts this document into the validation part."""
    return _hash(text) % VALIDATION_SHARE == 0


def _hash(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def select_split(rows: list[dict[str, Any]], split: str, name: str | Path) -> list[str]:
    """Return the non-empty texts of one split.

    Args:
        rows: Rows with a ``text``.
        split: As for `load_documents`.
        name: The data's, for errors.

    Raises:
        ValueError: None is left.
    """
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


def pick_text(row: dict[str, Any], column: str, name: str, *, is_chat: bool = False) -> str:
    """Return a row's text.

    Args:
        row: The row.
        column: The column that holds it.
        name: The data's, for errors.
        is_chat: Also take a column of chat messages, whose text is their JSON.

    Raises:
        ValueError: There is no such column, or it holds no text.
    """
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
        return read_document_file(path)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return _read_saved(path, split)
    files = data_files(path, _TEXT_SUFFIXES | TABLE_SUFFIXES)
    return (
        row if part is None else {**row, "split": part} for file, part in files for row in read_document_file(file)
    )


def read_document_file(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one file; of a plain text its passages.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is empty, broken or of another kind.
    """
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
