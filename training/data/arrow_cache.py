"""Arrow files in the cache of `datasets` that are written once, whole or not at all, and read from disk.

`write_once` is what texts and tokens of large data sets go through: a second start finds the file, two processes share
it, and a kill or a full disk in the middle leaves none. ``HF_DATASETS_CACHE`` moves the cache.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock


def cache_folder() -> Path:
    """Return the folder of this package in the cache of `datasets`."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "deepseek-moe"


def write_once(
    name: str, features: datasets.Features, batches: Callable[[], Iterator[dict[str, list[Any]]]]
) -> datasets.Dataset:
    """Return the rows of a cached file, memory-mapped; where it is not there, write it first.

    Of several processes the first writes and the others wait for it.

    Args:
        name: The file's, with a hash of all that decides its content.
        features: Of the rows.
        batches: Yields columns of some rows, as large as may be in memory at once.

    Raises:
        OSError: It cannot be written; nothing is left of it.
    """
    path = cache_folder() / f"{name}.arrow"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    _write(path, features, batches)
        except OSError as error:
            if error.errno is None or (error.filename and not str(error.filename).startswith(str(path.parent))):
                raise
            raise OSError(
                error.errno,
                f"data: got a cache {path.parent} that cannot be written ({os.strerror(error.errno)}), expected room "
                "in it; HF_DATASETS_CACHE names another folder",
            ) from None
    return datasets.Dataset.from_file(str(path))


def _write(path: Path, features: datasets.Features, batches: Callable[[], Iterator[dict[str, list[Any]]]]) -> None:
    """Write beside the file, of which there is no other writer, then move it into its place."""
    beside = path.with_suffix(".incomplete")
    try:
        writer = ArrowWriter(path=str(beside), features=features)
        for columns in batches():
            writer.write_batch(columns)
        writer.finalize()
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
