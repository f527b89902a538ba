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
    path = _check_name(path, setting, "folder")
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


def make_file_place(path: str | Path, setting: str) -> Path:
    """Return the path of a file that can be written, its folder made where it was absent.

    Args:
        path: The file, which may be there.
        setting: What named it, for the error.

    Raises:
        FileExistsError: A file stands in place of a folder above it.
        ValueError: It is a folder, or cannot be written.
    """
    path = _check_name(path, setting, "file")
    try:
        if path.is_dir():
            raise ValueError(f"{setting}: got the folder {path}, expected a file")
    except OSError as error:  # a name that is too long
        raise ValueError(f"{setting}: got {_shown(path)}, expected a file's name ({error.strerror})") from None
    make_output(path.parent, setting)
    return path


def _check_name(path: str | Path, setting: str, kind: str) -> Path:
    path = Path(path)
    if "\0" in str(path):
        raise ValueError(f"{setting}: got {_shown(path)}, expected a {kind}'s name without zero bytes")
    return path


def _shown(path: Path) -> str:
    text = str(path).replace("\0", "\\0")
    return text if len(text) <= 80 else f"{text[:76]} ..."
