"""Which files of a folder are data, and of which split: by the names that the Hub goes by.

A folder as a download from the Hub leaves it has its splits in names (``data/train-00000-of-00001.parquet``,
``validation.jsonl``, ``test/a.txt``). Every file is read in its role or named in a warning, once per folder.
"""

import functools
import logging
import re
from collections.abc import Iterable
from pathlib import Path

from deepseek_records.row_files import suffix_of
from deepseek_records.run_files import is_own_run

logger = logging.getLogger(__name__)
# Of the Hub's own bookkeeping, and of repositories; datasets passes them over, too.
_NO_DATA = {"readme.md", "license", "license.md", "license.txt", "config.json", "dataset_infos.json"}
_NAMED_AT_MOST = 5


def data_files(folder: Path, readable: Iterable[str]) -> list[tuple[Path, str | None]]:
    """Return a folder's data files in order, each with its split; None where names tell of no splits.

    Hidden files and folders are passed over. Names count as splits where some are training's and some are not, or
    where all files have one: a single ``test.txt`` among others is a file like them.

    Args:
        folder: The folder; all below it counts.
        readable: Suffixes that can be read, before ``.gz``.

    Raises:
        ValueError: No file can be read, or the folder is that of a run.
    """
    _refuse_run(folder)
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _is_hidden(path.relative_to(folder))]
    candidates = [path for path in found if path.name.lower() not in _NO_DATA] or found
    suffixes = set(readable)
    files = [path for path in candidates if suffix_of(path) in suffixes]
    if not files:
        names = f"; it holds {_list(candidates, folder)}" if candidates else ""
        raise ValueError(f"data: folder {folder} holds no .txt, .md, .jsonl, .csv or .parquet file{names}")
    splits = {path: split_of(path.relative_to(folder)) for path in files}
    roles = set(splits.values())
    is_split = None not in roles or ("train" in roles and len(roles - {None}) > 1)
    used = [path for path in files if not is_split or splits[path] is not None]
    unread = [path for path in candidates if path not in used]
    if unread:
        why = "; others are named by split" if len(used) < len(files) else "; write rows as .jsonl, .csv or .parquet"
        _warn_once(f"data: folder {folder}: not read: {_list(unread, folder)}{why}")
    return [(path, splits[path] if is_split else None) for path in used]


def _refuse_run(folder: Path) -> None:
    """Name the data of a run whose own folder was meant as data: it also holds what was dropped, and records."""
    if not is_own_run(folder):
        return
    data = folder / "data"
    hint = f"its data; pass {data}" if data.is_dir() else "a folder of text (the run has left none)"
    raise ValueError(f"data: got the run folder {folder}, expected {hint}")


def split_of(path: Path) -> str | None:
    """Return the split that a file's path inside its folder names: train, validation or test.

    Folders count before the file's name, as for `datasets`.
    """
    from datasets.data_files import SPLIT_KEYWORDS

    for part in path.parts:
        for split, keywords in SPLIT_KEYWORDS.items():
            if re.search(rf"(?:^|[-._ 0-9])(?:{'|'.join(keywords)})(?:[-._ 0-9]|$)", part):
                return str(split)
    return None


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.parts)


def _list(paths: list[Path], folder: Path) -> str:
    names = [str(path.relative_to(folder)) for path in paths[:_NAMED_AT_MOST]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)
