"""The owner of a run folder: one process writes, any other is told which.

`RunFolder.create` takes the lock and keeps it until the run is finished or the process ends, whatever ends it; the
operating system frees the lock, so a killed run leaves nothing to clean up. Within one process a run may be taken up
again.
"""

import fcntl
import logging
import os
from pathlib import Path

from deepseek_records.run_files import LOCK_FILE

logger = logging.getLogger(__name__)
_HELD: dict[Path, int] = {}  # by this process: a lock belongs to the process, not to one of its objects


def lock_run(folder: Path) -> None:
    """Become the owner of a run folder.

    Args:
        folder: The folder, which exists.

    Raises:
        FileExistsError: Another process is its owner.
    """
    path = folder.resolve() / LOCK_FILE
    held = _HELD.get(path)
    if held is not None:
        if path.exists() and os.path.samestat(os.fstat(held), path.stat()):
            return
        unlock_run(folder)  # The folder was deleted and made anew.
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(handle), path.stat()):
            os.close(handle)  # Its owner has just finished and removed the file that was opened here.
            return lock_run(folder)
    except BlockingIOError:
        owner = os.read(handle, 100).decode(errors="replace").strip() or "another process"
        os.close(handle)
        raise FileExistsError(
            f"output: {folder} is being written by {owner}; wait until it ends, or pass another --output"
        ) from None
    except OSError as error:  # Some network file systems have no locks.
        logger.warning("output: %s cannot be locked (%s); do not start the same run twice", folder, error.strerror)
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
    _HELD[path] = handle


def unlock_run(folder: Path) -> None:
    """Release the folder, where this process owns it.

    Args:
        folder: The folder.
    """
    path = folder.resolve() / LOCK_FILE
    handle = _HELD.pop(path, None)
    if handle is not None:
        path.unlink(missing_ok=True)
        os.close(handle)
