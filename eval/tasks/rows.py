"""Reading a benchmark's rows: embedded ones by default, the user's own by folder, file or Hub id.

Called by every task file. Some data may not be shipped for its license; then there is nothing embedded and
the error says where to get it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek_eval.tasks.row import Row
from deepseek_records.row_files import is_hub_id, load_hub_data, read_lines, read_table, suffix_of

EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "data"
_SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet", ".txt", ".txt.gz")


def find_source(text: str | Path) -> str | Path:
    """Return a path that exists, or a Hub id.

    Args:
        text: A folder, a file, or ``owner/name`` or ``owner/name:configuration``.

    Raises:
        FileNotFoundError: It is neither.
    """
    if Path(text).exists():
        return Path(text)
    if "/" in str(text) and is_hub_id(str(text)):
        return str(text)
    raise FileNotFoundError(
        f"data: {text} does not exist and is not a Hub id, expected a folder, a file, owner/name or owner/name:config"
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
    """Yield the rows of one file of JSON Lines, CSV, Parquet or plain text (a line per row, as ``text``).

    Args:
        names: The file's name without suffix; several where others call it otherwise.
        source: A folder holding the user's own file of that name, the file itself, or a Hub id; None for the embedded
            data.
        where: For data that is not embedded: where to get it, for the error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not a JSON object, or a Hub id cannot be read.
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
    if suffix_of(path) == ".txt":
        for number, line in enumerate(read_lines(path), start=1):
            yield Row({"text": line}, f"data: {path}, line {number}")
    else:
        yield from (Row(values, place) for values, place in read_table(path))


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


def _read_hub(source: str, name: str) -> Iterator[Row]:
    """The split that the name ends with (``mmlu_dev``: dev), else ``test``, else the only one."""
    splits = load_hub_data(source, "a folder or a file")
    wanted = [split for split in (name.rpartition("_")[2], "test") if split in splits] or list(splits)
    if len(wanted) > 1 and "test" not in splits:
        raise ValueError(f"data: {source} has the splits {', '.join(splits)}, expected test or a single one")
    for number, row in enumerate(splits[wanted[0]], start=1):
        yield Row(row, f"data: {source}, split {wanted[0]}, row {number}")
