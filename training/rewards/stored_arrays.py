"""Reads the arrays that an embedder or classifier is stored as."""

import zipfile
from pathlib import Path

import numpy as np


def read_arrays(path: str | Path, what: str) -> dict[str, np.ndarray]:
    """Return the arrays of a file of numpy's ``savez_compressed``, by name.

    Args:
        path: The file.
        what: What it holds, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is cut short or of another kind.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{what}: no file {path}")
    try:
        with np.load(path) as file:
            return dict(file)
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, TypeError) as error:
        raise ValueError(f"{what}: {path}: got no whole .npz file ({error}), expected one") from None
