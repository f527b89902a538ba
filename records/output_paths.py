"""The folder or file that a command is to write, checked before the work begins: one line says what is in the way."""

import errno
from pathlib import Path


def check_output(path: str | Path, setting: str = "output") -> Path:
    """Return the path of a folder that can be written, which may be absent.

    Args:
        path: The folder.
        setting: What named it, for the error.

    Raises:
        FileExistsError: A file stands there, or in place of a folder above it.
        ValueError: It cannot be looked at, as a name that is too long.
    """
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"{setting}: got {_shown(path)}, expected a folder's name without zero bytes")
    try:
        for folder in (path, *path.parents):
            if folder.is_dir():
                return path
            if folder.exists() or folder.is_symlink():
                got = f"the file {path}" if folder == path else f"{path}, below the file {folder}"
                raise FileExistsError(f"{setting}: got {got}, expected a folder")
    except FileExistsError:
        raise
    except OSError as error:  # a name that is too long, a loop of links
        raise ValueError(f"{setting}: got {_shown(path)}, expected a folder's name ({error.strerror})") from None
    return path


def make_output(path: str | Path, setting: str = "output") -> Path:
    """Return the path of a folder, made where it was absent.

    Args:
        path: The folder.
        setting: What named it, for the error.

    Raises:
        FileExistsError: As for `check_output`.
        ValueError: It cannot be made or written.
    """
    path = check_output(path, setting)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".deepseek-moe-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ValueError(f"{setting}: got {path}, expected a folder that can be written ({error.strerror})") from None
    return path


def _shown(path: Path) -> str:
    text = str(path).replace("\0", "\\0")
    return text if len(text) <= 80 else f"{text[:76]} ..."
