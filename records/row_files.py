"""Rows from a user's files and from the Hub: the one reader of training's texts and of evaluation's questions.

JSON Lines are parsed line by line and not by `datasets`, which gives every row the columns of all others (a chat
template then sees fields that a message does not have), refuses a column of two types, and names no line. Parquet
is read by pyarrow, as `datasets` does, without the copy that it keeps of a file. What `datasets` has written itself,
and what is on the Hub, it reads.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TABLE_SUFFIXES = frozenset({".jsonl", ".ndjson", ".csv", ".parquet"})
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


def suffix_of(path: Path) -> str:
    """Return what tells a file's kind: its suffix, lower-case, or the one before ``.gz``."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def read_table(path: Path, what: str = "data", encoding: str = "utf-8-sig") -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row of a file, and where it is, as an error about it begins.

    Args:
        path: A file with one of `TABLE_SUFFIXES`; all but Parquet also with ``.gz`` behind.
        what: The setting that named the file, for errors.
        encoding: Of JSON Lines and CSV.

    Raises:
        ValueError: The file is broken or of another kind, in one line that names file and line.
    """
    kind = suffix_of(path)
    if kind == ".parquet":
        yield from _read_parquet(path, what)
    elif kind == ".csv":
        yield from _read_csv(path, what, encoding)
    else:
        for number, line in enumerate(read_lines(path, what, encoding=encoding), start=1):
            if line.strip():
                where = f"{what}: {path}, line {number}"
                yield _parse_object(line, where), where


def read_lines(
    path: Path, what: str = "data", newline: str | None = None, encoding: str = "utf-8-sig"
) -> Iterator[str]:
    r"""Yield the lines of a text file, also one with ``.gz`` behind, with their ends.

    Only ``\n``, ``\r\n`` and ``\r`` end a line: a JSON text may hold the other characters that Python takes for ends.

    Args:
        path: The file.
        what: The setting that named it, for errors.
        newline: As for `open`.
        encoding: Likewise.

    Raises:
        ValueError: It is not of this encoding, not a whole gzip file, or holds zero bytes.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding=encoding, newline=newline) as file:
        try:
            for line in file:
                if "\0" in line:
                    raise ValueError(f"{what}: {path}: got zero bytes, expected text")
                yield line
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{what}: {path}: got bytes that are not {_named(encoding)} ({error.reason}), expected text"
            ) from None
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise ValueError(f"{what}: {path}: got no whole gzip file, expected one") from None


def _named(encoding: str) -> str:
    return "UTF-8" if encoding == "utf-8-sig" else encoding


def is_hub_id(text: str) -> bool:
    """Return whether a text can be ``name``, ``owner/name`` or ``owner/name:configuration``, and not a file's name."""
    return _HUB_ID.fullmatch(text) is not None and suffix_of(Path(text)) not in TABLE_SUFFIXES | {".txt", ".md"}


def load_hub_data(name: str, instead: str) -> Any:
    """Return a Hub data set: a ``DatasetDict`` of its splits.

    Args:
        name: ``owner/name`` or ``owner/name:configuration``.
        instead: What a user without network can pass, for the error.

    Raises:
        ValueError: It cannot be reached, or is not there.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None)
    except (ConnectionError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"data: {name} is not a local path and cannot be read from the Hub ({reason}); pass {instead}"
        ) from None


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of too many digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{where}: got no JSON ({reason}), expected an object") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {json_type(row)}, expected an object")
    if "\\ud" in line.lower() and not _is_encodable(row):
        raise ValueError(f"{where}: got half a surrogate pair, which no text can hold, expected a whole one")
    return row


def json_type(value: Any) -> str:
    """Return what JSON calls a value, with an article."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _is_encodable(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(path: Path, what: str, encoding: str) -> Iterator[tuple[dict[str, Any], str]]:
    reader = csv.DictReader(
        read_lines(path, what, newline="", encoding=encoding)
    )  # the CSV reader wants line ends as they are
    try:
        for values in reader:
            where = f"{what}: {path}, line {reader.line_num}"
            if None in values:
                raise ValueError(f"{where}: got more cells than columns, expected {len(reader.fieldnames or ())}")
            yield {name: value for name, value in values.items() if value is not None}, where
    except csv.Error as error:
        raise ValueError(f"{what}: {path}: got no CSV ({error}), expected a line per row") from None


def _read_parquet(path: Path, what: str) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow.lib
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{what}: {path}, row {number}"
    except (pyarrow.lib.ArrowInvalid, OSError):
        raise ValueError(f"{what}: {path}: got no whole Parquet file, expected one") from None
