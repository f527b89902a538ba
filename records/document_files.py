"""Documents from a user's files, folders and Hub data sets, as the training stages read them and evaluation does.

A plain text file is cut at blank lines into passages, so that one long file can still be split; and without a
``split`` column the split is by a hash of the document, so that it stays the same when documents are added or
reordered.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseek_records.data_folders import data_files
from deepseek_records.row_files import (
    TABLE_SUFFIXES,
    hub_revision,
    is_hub_id,
    load_hub_data,
    read_lines,
    read_table,
    suffix_of,
)

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "validation", "all")
VALIDATION_SHARE = 10  # one document in ten
_PASSAGE_CHARACTERS = 2000
TEXT_SUFFIXES = {".txt", ".md", ".text"}
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
    for row, name in read_documents(source, split):
        rows.append({**row, "text": pick_text(row, column or default_column(row), name)})
    return select_split(rows, split, source)


def read_documents(
    source: str | Path, split: str, others: tuple[str, ...] = (), encoding: str = "utf-8-sig"
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the rows of a source, each with the name of its file, or of the source where that has none.

    It is a file of text, JSON Lines, JSON, CSV, TSV or Parquet, also compressed, a folder of such files, a
    ``datasets`` directory or a Hub id.

    Args:
        source: Which.
        split: Used only to open the right part of a `datasets` directory or Hub data set.
        others: Names that could have been given, too, for errors.
        encoding: Of all files but Parquet.

    Raises:
        FileNotFoundError: Nothing lies there.
        ValueError: Empty, not text, or a Hub id without network.
    """
    name = str(source)
    if Path(source).exists():
        yield from _read_path(Path(source), split, with_mark(encoding))
        return
    known = f" (embedded names: {', '.join(others)})" if others else ""
    if not is_hub_id(name):
        raise FileNotFoundError(f"data: no file or folder {source}{known}")
    embedded = f"an embedded name ({', '.join(others)}), " if others else ""
    instead = f"{embedded}a .txt, .jsonl, .csv or .parquet file, or a folder of them"
    loaded = load_hub_data(name, instead, is_streamed=bool(hub_revision(name)))
    yield from ((row, name) for row in _rows_of(loaded, split))


def with_mark(encoding: str) -> str:
    """Return the encoding; for UTF-8 the one that takes a byte order mark for none of the text."""
    return "utf-8-sig" if encoding.lower().replace("_", "-") in ("utf-8", "utf8") else encoding


def default_column(row: dict[str, Any]) -> str:
    """Return the column that holds a row's text, where none is named."""
    return "prompt" if "prompt" in row and "text" not in row else "text"


def is_validation(text: str) -> bool:
    """Return whether the hash split puts this document into the validation part."""
    return hash_document(text) % VALIDATION_SHARE == 0


def hash_document(text: str) -> int:
    """Return the first 32 bits of a document's SHA-256, which decide its split."""
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
    import numpy as np

    rows = [row for row in rows if row["text"].strip()]
    if not rows:
        raise ValueError(f"data: {name} is empty; it holds no text")
    splits = np.array([str(row.get("split") or "") for row in rows], dtype=object)
    hashes = np.array([hash_document(row["text"]) << 32 for row in rows], dtype=np.uint64)
    mask = split_mask(splits, hashes, split, name)
    return [row["text"] for row, is_chosen in zip(rows, mask, strict=True) if is_chosen]


def split_mask(
    splits: "np.ndarray", hashes: "np.ndarray", split: str, name: str | Path, *, share: float | None = None
) -> "np.ndarray":
    """Return which documents are of a split.

    Args:
        splits: What each one's source calls its split; empty for nothing.
        hashes: The first 64 bits of each one's SHA-256.
        split: As for `load_documents`.
        name: The data's, for errors.
        share: Of documents that are validation where nothing tells of splits; None: one in ten.

    Raises:
        ValueError: None is left.
    """
    import numpy as np

    if split == "all":
        return np.ones(len(splits), dtype=bool)
    found = set(splits)
    if found - {""}:
        mask: np.ndarray = np.isin(splits, [part for part in found if part in _SPLIT_NAMES[split]])
        if not mask.any():
            names = ", ".join(sorted(part or "None" for part in found))
            raise ValueError(f"data: {name} has no row with split '{split}' (its column 'split' holds: {names})")
        return mask
    short = hashes >> np.uint64(32)
    held_out = short % VALIDATION_SHARE == 0 if share is None else short < int(share * 2**32)
    # A small set still gets one held-out document, the one with the least hash.
    if not held_out.any() and len(splits) > 1 and share != 0:
        held_out = np.arange(len(splits)) == int(short.argmin())
    mask = held_out if split == "validation" else ~held_out
    if not mask.any():
        raise ValueError(
            f"data: {name} has {len(splits)} document(s), too few for a {split} split; add more documents"
        )
    return mask


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


def _read_path(path: Path, split: str, encoding: str) -> Iterator[tuple[dict[str, Any], str]]:
    if path.is_file():
        yield from ((row, str(path)) for row in read_document_file(path, encoding))
    elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        yield from ((row, str(path)) for row in _read_saved(path, split))
    else:
        for file, part in data_files(path, TEXT_SUFFIXES | TABLE_SUFFIXES):
            for row in read_document_file(file, encoding):
                yield (row if part is None else {**row, "split": part}), str(file)


def read_document_file(path: Path, encoding: str = "utf-8-sig") -> Iterator[dict[str, Any]]:
    """Yield the rows of one file; of a plain text its passages.

    Args:
        path: The file.
        encoding: Its encoding, unless it is Parquet.

    Raises:
        FileNotFoundError: It is not there.
        ValueError: It is empty, broken or of another kind.
    """
    if not path.exists():
        raise FileNotFoundError(f"data: no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"data: {path} is empty")
    if suffix_of(path) in TABLE_SUFFIXES:
        yield from (row for row, _ in read_table(path, encoding=encoding))
    else:
        for _, passage in cut_passages(read_lines(path, newline="", encoding=encoding)):
            yield {"text": passage}


def cut_passages(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Yield passages of at least `_PASSAGE_CHARACTERS` with the number of the line that each begins on.

    They are cut behind blank lines, behind any line where no blank one has come for long. Joined they are the text.

    Args:
        lines: With their ends.
    """
    kept: list[str] = []
    size, number, ends = 0, 0, False
    for number, line in enumerate(lines, start=1):
        if ends and line.strip():
            yield number - len(kept), "".join(kept)
            kept, size = [], 0
        kept.append(line)
        size += len(line)
        ends = size >= _PASSAGE_CHARACTERS * (4 if line.strip() else 1)
    if kept:
        yield number - len(kept) + 1, "".join(kept)


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
