"""Text that `deepseek-moe data` left: which run it came from, and what of that run a model's records keep.

A training notes the licenses, sources and counts of the text when it reads it, so that the model card tells them when
the text has gone. `deepseek_records.data_folders` refuses the run's own folder, which holds what was dropped, too.
"""

import hashlib
import logging
from pathlib import Path

from deepseek_records.run_files import is_own_run
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Cleaning, CleaningFilter, CleaningSource

logger = logging.getLogger(__name__)
DATA_FOLDER, CARD_FILE = "data", "README.md"
_COMMAND = "data"


def is_cleaning(folder: Path) -> bool:
    """Tell whether a folder is a run of the command `data`, finished or not.

    Args:
        folder: The folder.
    """
    return is_own_run(folder) and RunFolder(folder).environment.command == _COMMAND


def find_cleaning(path: str | Path) -> RunFolder | None:
    """Return the finished run that left a data folder or one of its files, None for other text.

    Files that are no longer as the run left them are other text, and a warning says so.

    Args:
        path: As a stage's setting names it.
    """
    path = Path(path)
    if not path.exists():
        return None
    path = path.resolve()
    folder = path if path.is_dir() else path.parent
    if folder.name != DATA_FOLDER or not is_cleaning(folder.parent):
        return None
    run = RunFolder(folder.parent)
    if not run.is_finished:
        return None
    altered = _find_altered(run)
    if altered:
        logger.warning("data: %s is not as its run left it; the run's licenses and sources are not recorded", altered)
    return None if altered else run


def _find_altered(run: RunFolder) -> Path | None:
    """The first file of the data that is missing, that was added, or whose checksum is another."""
    known = {run.path / name: value for name, value in run.summary.details.get("files", {}).items()}
    for path in sorted({*known, *(run.path / DATA_FOLDER).iterdir()}):
        if path not in known or not path.is_file():
            return path
        with open(path, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != known[path]:
                return path
    return None


def describe_cleaning(run: RunFolder) -> Cleaning:
    """Return what a model's records keep of a cleaning.

    Args:
        run: A finished one.

    Raises:
        ValueError: Its summary does not fit.
    """
    summary = run.summary
    sources = [
        CleaningSource(
            name=use.name,
            split=use.split,
            license=use.license,
            source=use.source,
            num_rows=use.num_rows,
            num_bytes=use.num_bytes,
            languages=use.languages,
        )
        for use in summary.data
    ]
    filters = [
        CleaningFilter(name=row["name"], num_in=row["num_in"], num_dropped=row["num_dropped"])
        for row in summary.details.get("filters", [])
    ]
    return Cleaning(run=str(run.path), sources=tuple(sources), filters=tuple(filters))
