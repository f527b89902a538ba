"""Reads the sources of a recipe row by row in bounded memory, and tells each row's file and line.

`survey` looks at every file once before anything is done: its bytes decode, and its hash is kept. `read_documents`
yields the rows in the order of the sources and files, by the readers of `deepseek_records` that training and
evaluation use, too.
"""

import codecs
import dataclasses
import hashlib
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from deepseek_records.data_folders import data_files
from deepseek_records.document_files import TEXT_SUFFIXES, cut_passages, with_mark
from deepseek_records.row_files import TABLE_SUFFIXES, is_hub_id, read_lines, read_table, suffix_of
from deepseek_training.data.cleaning.documents import Document, hash_text
from deepseek_training.data.texts import DATA_FOLDER, EMBEDDED
from deepseek_training.recipes.data import SourceSettings

_READABLE = TEXT_SUFFIXES | TABLE_SUFFIXES
# From this many text files on a source's documents are its files; of fewer, passages are, or none could be held out.
_MANY_FILES = 20
_ROLES = {"train": "train", **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "test"), "validation")}


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """One file of a source.

    Args:
        path: Where it lies.
        name: Its path inside the source.
        split: ``train`` or ``validation`` where its name says so.
        sha256: Of its bytes.
        num_bytes: Its size.
    """

    path: Path
    name: str
    split: str | None
    sha256: str = ""
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Source:
    """A source with its files; none for one of the Hub or a `datasets` directory.

    Args:
        settings: As the recipe gives them.
        files: In order.
        directory_sha256: Of the files of a `datasets` directory.
    """

    settings: SourceSettings
    files: tuple[SourceFile, ...] = ()
    directory_sha256: str = ""

    @property
    def sha256(self) -> str:
        """Of the files' hashes and names; of the id alone for the Hub, whose rows are streamed."""
        if self.directory_sha256:
            return self.directory_sha256
        parts = [f"{file.name} {file.sha256}" for file in self.files] or [self.settings.path]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def survey(settings: SourceSettings, encoding: str) -> Source:
    """Return a source with its files, each looked at once.

    Args:
        settings: Of the source.
        encoding: Of text, JSON Lines and CSV.

    Raises:
        FileNotFoundError: Nothing lies there, and it cannot be a Hub id.
        ValueError: A file is empty or does not decode; the file is named.
    """
    path = DATA_FOLDER / EMBEDDED[settings.path].file if settings.path in EMBEDDED else Path(settings.path)
    if path.is_file():
        if suffix_of(path) not in _READABLE:
            raise ValueError(f"sources: got the file {path}, expected {', '.join(sorted(_READABLE))}, also compressed")
        return Source(settings, (_survey_file(path, path.name, None, encoding),))
    if not path.is_dir():
        if not is_hub_id(settings.path):
            raise FileNotFoundError(f"sources: no file or folder {settings.path} (embedded: {', '.join(EMBEDDED)})")
        return Source(settings)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return Source(settings, directory_sha256=_hash_directory(path))
    files = data_files(path, _READABLE)
    found = [_survey_file(file, str(file.relative_to(path)), _ROLES.get(part or ""), encoding) for file, part in files]
    return Source(settings, tuple(found))


def read_documents(source: Source, encoding: str) -> Iterator[Document]:
    """Yield a source's documents in order; those without text too, so that they are counted.

    Args:
        source: From `survey`.
        encoding: Of text, JSON Lines and CSV.

    Raises:
        ValueError: A column is missing or holds no text, or a file cannot be parsed; the file is named.
    """
    if not source.files:
        yield from _read_without_files(source.settings)
        return
    for file in source.files:
        split = source.settings.role or file.split
        if suffix_of(file.path) in TEXT_SUFFIXES:
            by_file = len(source.files) >= _MANY_FILES
            yield from _read_text(file, source.settings, encoding, split=split, by_file=by_file)
            continue
        for line, row in _read_table(file, encoding):
            yield _document(row, source.settings, file.name, line, split)


def _hash_directory(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(one for one in path.rglob("*") if one.is_file()):
        with open(file, "rb") as opened:
            digest.update(f"{file.relative_to(path)} {hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _survey_file(path: Path, name: str, split: str | None, encoding: str) -> SourceFile:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    if not size:
        raise ValueError(f"sources: {path} is empty")
    if suffix_of(path) != ".parquet":
        _decode(path, encoding)
    return SourceFile(path, name, split, digest.hexdigest(), size)


def _decode(path: Path, encoding: str) -> None:
    """Refuse a file with a byte that does not decode, and name its line."""
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise ValueError(f"encoding: got {encoding!r}, expected one that Python knows, such as gb18030") from None
    number = 1
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in decoder.decode(line):
                    raise ValueError(f"sources: {path} is not text (line {number} holds zero bytes)")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"sources: {path}, line {number}: got bytes that are not {encoding} ({error.reason}); set encoding"
        ) from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(
            f"sources: {path}: got a compressed file that is cut short or broken, expected a whole one"
        ) from None


def _read_table(file: SourceFile, encoding: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with the line that each stands on; of what `datasets` reads with their number."""
    for row, where in read_table(file.path, "sources", with_mark(encoding)):
        yield int(where.rpartition(" ")[2]), row


def _first_line(error: BaseException) -> str:
    lines = str(error.__cause__ or error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _document(row: dict[str, Any], settings: SourceSettings, file: str, line: int, split: str | None) -> Document:
    column = settings.column or ("text" if "text" in row or "prompt" not in row else "prompt")
    if column not in row:
        raise ValueError(
            f"column: {settings.name}: {file} has no column '{column}' (it has: {', '.join(row)}); name one of them"
        )
    text = row[column]
    if not isinstance(text, str | None):
        raise ValueError(
            f"column: {settings.name}: {file}, line {line}: '{column}' holds {type(text).__name__}, expected text"
        )
    text = text or ""
    unit = hash_text(text)
    if settings.document_column:
        if settings.document_column not in row:
            raise ValueError(f"document_column: {settings.name}: {file} has no column '{settings.document_column}'")
        unit = hash_text(str(row[settings.document_column]))
    own = _ROLES.get(str(row.get("split") or ""))
    return Document(text, str(settings.name), file, line, unit, settings.role or own or split)


def _read_text(
    file: SourceFile, settings: SourceSettings, encoding: str, *, split: str | None, by_file: bool
) -> Iterator[Document]:
    """A plain text file, line by line, cut into passages at blank lines, after a long while at any line."""
    for line, passage in cut_passages(read_lines(file.path, "sources", "", with_mark(encoding))):
        yield Document(
            passage, str(settings.name), file.name, line, hash_text(file.name if by_file else passage), split
        )


def _read_without_files(settings: SourceSettings) -> Iterator[Document]:
    import datasets

    try:
        if Path(settings.path).is_dir():
            loaded: Any = datasets.load_from_disk(settings.path)
        else:
            repository, _, configuration = settings.path.partition(":")
            loaded = datasets.load_dataset(repository, configuration or None, streaming=True)
    except (ConnectionError, OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"sources: {settings.path} is not a local path and cannot be read as a data set ({_first_line(error)})"
        ) from None
    parts = loaded.items() if hasattr(loaded, "items") else [("", loaded)]
    for part, rows in parts:
        for number, row in enumerate(rows, start=1):
            name = f"{settings.path}:{part}" if part else settings.path
            yield _document(dict(row), settings, name, number, _ROLES.get(part))
