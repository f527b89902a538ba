"""Reading a benchmark's rows: embedded ones by default, the user's own by folder, file or Hub id.

Called by every task file. Some data may not be shipped for its license; then there is nothing embedded and
the error says where to get it.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek_eval.tasks.row import Row

EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "data"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".txt", ".txt.gz")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def find_source(text: str | Path) -> str | Path:
    """Return a path that exists, or a Hub id.

    Args:
        text: A folder, a file, or ``owner/name`` or ``owner/name:configuration``.

    Raises:
        FileNotFoundError: It is neither.
    """
    if Path(text).exists():
        return Path(text)
    if _HUB_ID.fullmatch(str(text)):
        return str(text)
    raise FileNotFoundError(
        f"data: {text} does not exist and is no Hub id, expected a folder, a file, owner/name or owner/name:config"
    )


def check_folder(source: str | Path | None, holds: str) -> None:
    """Refuse a single file where a task reads several.

    Args:
        source: As for `read_rows`.
        holds: What the folder must hold, for the error.

    Raises:
        ValueError: It is a file.
    """
    if isinstance(source, Path) and source.is_file():
        raise ValueError(f"data: {source} is a file, expected a folder with {holds}")


def read_rows(names: str | Sequence[str], source: str | Path | None = None, *, where: str = "") -> Iterator[Row]:
    """Yield the rows of one file of JSON Lines, CSV or plain text (a line per row, as ``text``).

    Args:
        names: The file's name without suffix; several where others call it otherwise.
        source: A folder holding the user's own file of that name, the file itself, or a Hub id; None for the embedded
            data.
        where: For data that is not embedded: where to get it, for the error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no JSON object, or a Hub id cannot be read.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    if isinstance(source, str):
        yield from _read_hub(source, names[0])
        return
    path = find_file(names, source)
    if path is None and source is None and where:
        raise FileNotFoundError(f"data: {names[0]} is not shipped; {where}")
    if path is None:
        folder = EMBEDDED_FOLDER if source is None else source
        wanted = [f"{name}{suffix}" for name in names for suffix in _SUFFIXES[:3]]
        raise FileNotFoundError(f"data: {folder} holds neither {' nor '.join(wanted)}")
    if path.suffix == ".csv":
        yield from _parse_csv(path)
    elif path.name.removesuffix(".gz").endswith(".txt"):
        yield from _parse_text(path)
    else:
        yield from _parse_lines(path)


def find_file(names: str | Sequence[str], source: Path | None = None) -> Path | None:
    """Return the file that `read_rows` would read, None where there is none.

    Args:
        names: As for `read_rows`.
        source: A folder or a file; None for the embedded data.
    """
    folder = EMBEDDED_FOLDER if source is None else source
    if folder.is_file():
        return folder
    paths = (
        folder / f"{name}{suffix}" for name in ((names,) if isinstance(names, str) else names) for suffix in _SUFFIXES
    )
    return next((path for path in paths if path.is_file()), None)


def _parse_csv(path: Path) -> Iterator[Row]:
    reader = csv.DictReader(_read_lines(path))
    try:
        for values in reader:
            where = f"data: {path}, line {reader.line_num}"
            if None in values:
                raise ValueError(f"{where}: got more cells than columns, expected {len(reader.fieldnames or ())}")
            yield Row({name: value for name, value in values.items() if value is not None}, where)
    except csv.Error as error:
        raise ValueError(f"data: {path} is no CSV file ({error})") from None


def _parse_text(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path), start=1):
        yield Row({"text": line}, f"data: {path}, line {number}")


def _read_lines(path: Path) -> Iterator[str]:
    # A CSV reader wants line ends as they are.
    options = {"encoding": "utf-8-sig", "newline": "" if path.suffix == ".csv" else None}
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", **options) as file:
        try:
            yield from file
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {path} is no UTF-8 text ({error.reason})") from None
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise ValueError(f"data: {path} is no whole gzip file") from None


def _parse_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"data: {path}, line {number} is no JSON ({reason})") from None
        if not isinstance(row, dict):
            raise ValueError(f"data: {path}, line {number} is {type(row).__name__}, expected an object")
        yield Row(row, f"data: {path}, line {number}")


def _read_hub(source: str, name: str) -> Iterator[Row]:
    """The split that the name ends with (``mmlu_dev``: dev), else ``test``, else the only one."""
    import datasets

    repository, _, configuration = source.partition(":")
    try:
        splits = datasets.load_dataset(repository, configuration or None)
    except (ConnectionError, OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"data: {source} is no local path and cannot be read from the Hub ({reason}); pass a folder or a file"
        ) from None
    wanted = [split for split in (name.rpartition("_")[2], "test") if split in splits] or list(splits)
    if len(wanted) > 1 and "test" not in splits:
        raise ValueError(f"data: {source} has the splits {', '.join(splits)}, expected test or a single one")
    for number, row in enumerate(splits[wanted[0]], start=1):
        yield Row(row, f"data: {source}, split {wanted[0]}, row {number}")
