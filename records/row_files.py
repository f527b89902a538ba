"""Rows from a user's files and from the Hub: the one reader of training's texts and of evaluation's questions.

JSON Lines, CSV and TSV are parsed line by line and not by `datasets`, which gives every row the columns of all others
(a chat template then sees fields that a message does not have), makes nothing of cells such as ``NA``, refuses a
column of two types, and names no line. All else `datasets` reads: JSON, Parquet, its own directories, the Hub.
"""

import codecs
import contextlib
import csv
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.utils import infer_compression

TABLE_SUFFIXES = frozenset({".jsonl", ".ndjson", ".csv", ".parquet", ".json", ".tsv"})
# zst needs the package zstandard; without it such files are named as not read.
COMPRESSED_SUFFIXES = tuple(one for one in (".gz", ".bz2", ".xz", ".zst") if infer_compression(f"a{one}"))
_BY_DATASETS = {".parquet": "parquet", ".json": "json"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")


class WrongEncodingError(ValueError):
    """A file does not hold text of the encoding that was asked for; who lets one be set can say so."""


def suffix_of(path: Path) -> str:
    """Return what tells a file's kind: its suffix, lower-case, or the one before that of a compression."""
    return (path.with_suffix("") if path.suffix in COMPRESSED_SUFFIXES else path).suffix.lower()


def read_table(path: Path, what: str = "data", encoding: str = "utf-8-sig") -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each row of a file, and where it is, as an error about it begins.

    Args:
        path: A file with one of `TABLE_SUFFIXES`; all but Parquet also with one of `COMPRESSED_SUFFIXES` behind.
        what: The setting that named the file, for errors.
        encoding: Of all but Parquet.

    Raises:
        ValueError: The file is broken or of another kind, in one line that names file and line.
    """
    kind = suffix_of(path)
    if kind in _BY_DATASETS:
        yield from _read_by_datasets(path, what, encoding)
    elif kind in (".csv", ".tsv"):
        yield from _read_csv(path, what, encoding)
    else:
        for number, line in enumerate(read_lines(path, what, encoding=encoding), start=1):
            if line.strip():
                where = f"{what}: {path}, line {number}"
                yield _parse_object(line, where), where


def read_lines(
    path: Path, what: str = "data", newline: str | None = None, encoding: str = "utf-8-sig"
) -> Iterator[str]:
    r"""Yield the lines of a text file, also a compressed one, with their ends.

    Only ``\n``, ``\r\n`` and ``\r`` end a line: a JSON text may hold the other characters that Python takes for ends.

    Args:
        path: The file.
        what: The setting that named it, for errors.
        newline: As for `open`.
        encoding: Likewise.

    Raises:
        ValueError: It is not of this encoding, not whole where it is compressed, or holds zero bytes.
    """
    try:
        with _open_text(path, encoding, newline) as file:
            for line in file:
                if "\0" in line:
                    raise ValueError(f"{what}: {path}: got zero bytes, expected text")
                yield line
    except UnicodeDecodeError as error:
        raise WrongEncodingError(
            f"{what}: {path}, line {_undecodable_line(path, encoding)}: got bytes that are not {_named(encoding)} "
            f"({error.reason}), expected text"
        ) from None
    except LookupError:
        raise ValueError(f"encoding: got {encoding!r}, expected one that Python knows, such as gb18030") from None
    except _broken_files():
        kind = {".gz": "gzip"}.get(path.suffix, path.suffix[1:])
        raise ValueError(f"{what}: {path}: got no whole {kind} file, expected one") from None


def _open_text(path: Path, encoding: str, newline: str | None) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding, newline=newline)
    compression = "infer" if path.suffix in COMPRESSED_SUFFIXES else None
    return fsspec.open(str(path), "rt", encoding=encoding, newline=newline, compression=compression).open()


def _broken_files() -> tuple[type[Exception], ...]:
    """What the unpackers raise for a file that is cut short or of another kind."""
    known: tuple[type[Exception], ...] = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
    try:
        import zstandard
    except ImportError:
        return known
    return (*known, zstandard.ZstdError)


def _undecodable_line(path: Path, encoding: str) -> int:
    """The line that does not decode: a text file is decoded ahead of its lines."""
    decoder, number = codecs.getincrementaldecoder(encoding)(), 0
    with fsspec.open(str(path), "rb", compression="infer") as file, contextlib.suppress(UnicodeDecodeError):
        for line in file:
            number += 1
            decoder.decode(line)
    return number


def _named(encoding: str) -> str:
    return "UTF-8" if encoding == "utf-8-sig" else encoding


def is_hub_id(text: str) -> bool:
    """Return whether a text can be ``name``, ``owner/name`` or ``owner/name:configuration``, and not a file's name."""
    return _HUB_ID.fullmatch(text) is not None and suffix_of(Path(text)) not in TABLE_SUFFIXES | {".txt", ".md"}


def load_hub_data(name: str, instead: str, *, is_streamed: bool = False) -> Any:
    """Return a Hub data set: a dictionary of its splits.

    Args:
        name: ``owner/name`` or ``owner/name:configuration``.
        instead: What a user without network can pass, for the error.
        is_streamed: Read it as it comes; else it is downloaded and kept by `datasets`.

    Raises:
        ValueError: It cannot be reached, or is not there.
    """
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        return datasets.load_dataset(repository, configuration or None, streaming=is_streamed)
    except (ConnectionError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"data: {name} is not a local path and cannot be read from the Hub ({reason}); pass {instead}"
        ) from None


def hub_revision(name: str) -> str:
    """Return the commit that a Hub data set is at, empty where the Hub cannot be asked.

    Args:
        name: As for `load_hub_data`.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(name.partition(":")[0]).sha or "")
    except Exception:  # each HTTP library has its own; `load_hub_data` says what is wrong
        return ""


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
        read_lines(path, what, newline="", encoding=encoding), delimiter="\t" if suffix_of(path) == ".tsv" else ","
    )  # the CSV reader wants line ends as they are
    try:
        for values in reader:
            where = f"{what}: {path}, line {reader.line_num}"
            if None in values:
                raise ValueError(f"{where}: got more cells than columns, expected {len(reader.fieldnames or ())}")
            yield {name: value for name, value in values.items() if value is not None}, where
    except csv.Error as error:
        raise ValueError(f"{what}: {path}: got no CSV ({error}), expected a line per row") from None


def _read_by_datasets(path: Path, what: str, encoding: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows as `datasets` streams them: it keeps no copy of the file."""
    import datasets

    kind = suffix_of(path)
    options: dict[str, Any] = {} if kind == ".parquet" else {"encoding": encoding}
    try:
        rows = datasets.load_dataset(
            _BY_DATASETS[kind], data_files=str(path), split="train", streaming=True, **options
        )
        for number, row in enumerate(rows, start=1):
            yield row, f"{what}: {path}, row {number}"
    except LookupError:
        raise ValueError(f"encoding: got {encoding!r}, expected one that Python knows, such as gb18030") from None
    except Exception as error:  # each builder has its own
        if isinstance(error, OSError) and error.errno:
            raise
        name = "Parquet" if kind == ".parquet" else kind[1:].upper()
        lines = str(error.__cause__ or error).splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise ValueError(f"{what}: {path}: got no whole {name} file, expected one ({reason})") from None
