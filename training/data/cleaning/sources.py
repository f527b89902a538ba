"""Reads the sources of a recipe by `datasets`, row by row in bounded memory, and tells each row's file and line.

`survey` looks at every file once before anything is done: its bytes decode, its hash is kept, and of JSON Lines it
notes blank lines, so that the number of a row gives the number of its line. `read_documents` yields the rows in the
order of the sources and files.
"""

import codecs
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from deepseek_training.data.cleaning.documents import Document, hash_text
from deepseek_training.data.folders import data_files, suffix_of
from deepseek_training.data.texts import DATA_FOLDER, EMBEDDED
from deepseek_training.recipes.data import SourceSettings

_TEXT, _LINES = (".txt", ".md", ".text"), (".jsonl", ".ndjson")
_BUILDERS = {
    **dict.fromkeys(_TEXT, "text"),
    **dict.fromkeys((*_LINES, ".json"), "json"),
    **{".csv": "csv", ".tsv": "csv", ".parquet": "parquet"},
}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# From this many text files on a source's documents are its files; of fewer, passages are, or none could be held out.
_MANY_FILES = 20
_PASSAGE_CHARACTERS = 2000
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
        blank_lines: Numbers of the blank lines, of JSON Lines only.
    """

    path: Path
    name: str
    split: str | None
    sha256: str = ""
    num_bytes: int = 0
    blank_lines: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Source:
    """A source with its files; none for one of the Hub or a `datasets` directory.

    Args:
        settings: As the recipe gives them.
        files: In order.
    """

    settings: SourceSettings
    files: tuple[SourceFile, ...] = ()

    @property
    def sha256(self) -> str:
        """Of the files' hashes and names; of the path alone where there are no files."""
        parts = [f"{file.name} {file.sha256}" for file in self.files] or [self.settings.path]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def survey(settings: SourceSettings, encoding: str) -> Source:
    """Return a source with its files, each looked at once.

    Args:
        settings: Of the source.
        encoding: Of text, JSON Lines and CSV.

    Raises:
        FileNotFoundError: Nothing lies there, and it is no Hub id.
        ValueError: A file is empty or does not decode; the file is named.
    """
    path = DATA_FOLDER / EMBEDDED[settings.path].file if settings.path in EMBEDDED else Path(settings.path)
    if path.is_file():
        if suffix_of(_plain(path)) not in _BUILDERS:
            raise ValueError(f"sources: got the file {path}, expected {', '.join(sorted(_BUILDERS))}, also compressed")
        return Source(settings, (_survey_file(path, path.name, None, encoding),))
    if not path.is_dir():
        if path.suffix in _BUILDERS or path.is_absolute() or settings.path.count("/") != 1:
            raise FileNotFoundError(f"sources: no file or folder {settings.path} (embedded: {', '.join(EMBEDDED)})")
        return Source(settings)
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return Source(settings)
    files = data_files(path, _BUILDERS)
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
        builder = _BUILDERS[suffix_of(_plain(file.path))]
        split = source.settings.role or file.split
        if builder == "text":
            by_file = len(source.files) >= _MANY_FILES
            yield from _read_text(file, source.settings, encoding, split=split, by_file=by_file)
        else:
            rows = _rows(builder, file, encoding)
            for number, row in enumerate(rows, start=1):
                yield _document(row, source.settings, file.name, _line(file, number), split)


def _survey_file(path: Path, name: str, split: str | None, encoding: str) -> SourceFile:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    if not size:
        raise ValueError(f"sources: {path} is empty")
    suffix = suffix_of(_plain(path))
    blank = () if suffix == ".parquet" else _decode(path, encoding, is_lines=suffix in _LINES)
    return SourceFile(path, name, split, digest.hexdigest(), size, blank)


def _decode(path: Path, encoding: str, *, is_lines: bool) -> tuple[int, ...]:
    """The numbers of the blank lines, after every byte has been decoded."""
    blank: list[int] = []
    try:
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise ValueError(f"encoding: got {encoding!r}, expected one that Python knows, such as gb18030") from None
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            for number, line in enumerate(file, start=1):
                text = decoder.decode(line)
                if "\0" in text:
                    raise ValueError(f"sources: {path} is not text (line {number} holds zero bytes)")
                if is_lines and not text.strip():
                    blank.append(number)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"sources: {path}, line {number}: got bytes that are no {encoding} ({error.reason}); set encoding"
        ) from None
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"sources: {path} is no whole compressed file") from None
    return tuple(blank)


def _line(file: SourceFile, row: int) -> int:
    """The line of the row of that number, from 1."""
    line = row
    for blank in file.blank_lines:
        if blank <= line:
            line += 1
    return line


def _plain(path: Path) -> Path:
    return path.with_suffix("") if path.suffix in _COMPRESSED else path


def _rows(builder: str, file: SourceFile, encoding: str, **options: Any) -> Iterator[dict[str, Any]]:
    import datasets

    if builder != "parquet":
        # A byte order mark is no text.
        options["encoding"] = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    if _plain(file.path).suffix.lower() == ".tsv":
        options["sep"] = "\t"
    try:
        loaded = datasets.load_dataset(builder, data_files=str(file.path), split="train", streaming=True, **options)
        yield from loaded
    except (OSError, MemoryError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"sources: {file.path} cannot be read ({_first_line(error)})") from None
    except Exception as error:  # each builder has its own
        raise ValueError(f"sources: {file.path} is no {builder} file of equal rows ({_first_line(error)})") from None


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
    for line, passage in _passages(_rows("text", file, encoding, keep_linebreaks=True)):
        yield Document(
            passage, str(settings.name), file.name, line, hash_text(file.name if by_file else passage), split
        )


def _passages(rows: Iterator[dict[str, Any]]) -> Iterator[tuple[int, str]]:
    """Passages with the number of the line that each begins on; joined they are the file again."""
    lines: list[str] = []
    size = 0
    number = 0
    for number, row in enumerate(rows, start=1):
        lines.append(row["text"])
        size += len(row["text"])
        if size >= _PASSAGE_CHARACTERS * (1 if not row["text"].strip() else 4):
            yield number - len(lines) + 1, "".join(lines)
            lines, size = [], 0
    if lines:
        yield number - len(lines) + 1, "".join(lines)


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
            f"sources: {settings.path} is no local path and cannot be read as a data set ({_first_line(error)})"
        ) from None
    parts = loaded.items() if hasattr(loaded, "items") else [("", loaded)]
    for part, rows in parts:
        for number, row in enumerate(rows, start=1):
            name = f"{settings.path}:{part}" if part else settings.path
            yield _document(dict(row), settings, name, number, _ROLES.get(part))
