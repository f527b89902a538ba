"""Which model of a run is in force: the link ``current``, changed by one rename and so never half.

    RUN/model                 the run's own model
    RUN/updates/0001/model    a model that an update has left
    RUN/current               a link to one of them; ``deepseek-moe serve RUN/current`` takes what it points to

What an update began from stands in its recipe, so that rolling back needs no other record.
"""

import os
from pathlib import Path

from deepseek_records.run_files import CURRENT_LINK, MODEL_FOLDER, UPDATES_FOLDER
from deepseek_records.run_folder import RunFolder


def current_model(run: Path) -> Path:
    """Return the folder of the model in force, below the run.

    Args:
        run: The run folder; without a link its own model is in force.

    Raises:
        ValueError: The link leads to no model of this run.
    """
    link = run / CURRENT_LINK
    if not link.is_symlink():
        if link.exists():
            raise ValueError(f"run: got {link}, which is not a link, expected the model in force; move it away")
        return run / MODEL_FOLDER
    target = run / os.readlink(link)
    is_known = target == run / MODEL_FOLDER or target.parent.parent == run / UPDATES_FOLDER
    if not is_known or not (target / "config.json").is_file():
        raise ValueError(f"run: got {link} that leads to {os.readlink(link)}, expected a model of this run")
    return target


def point_to(run: Path, model: Path) -> None:
    """Put a model in force.

    Args:
        run: The run folder.
        model: The model's folder below it, whole.
    """
    assert (model / "config.json").is_file(), f"{model} is whole before it is in force"
    _sync(model)
    temporary = run / f"{CURRENT_LINK}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(model.relative_to(run))
    os.replace(temporary, run / CURRENT_LINK)
    _sync_folder(run)


def ensure_link(run: Path) -> None:
    """Put the run's own model in force where nothing is yet.

    Args:
        run: The run folder.
    """
    if not (run / CURRENT_LINK).is_symlink():
        point_to(run, current_model(run))


def update_of(run: Path, model: Path) -> RunFolder | None:
    """Return the update that left a model, None for the run's own.

    Args:
        run: The run folder.
        model: From `current_model`.
    """
    return None if model == run / MODEL_FOLDER else RunFolder(model.parent)


def base_of(run: Path, update: RunFolder) -> Path:
    """Return the model that an update began from.

    Args:
        run: The run folder.
        update: The update.
    """
    return run / str(update.settings["model"])


def all_updates(run: Path) -> list[RunFolder]:
    """Return a run's updates in order, finished or not.

    Args:
        run: The run folder.
    """
    folders = (run / UPDATES_FOLDER).glob("[0-9]*")
    return [RunFolder(path) for path in sorted(folders) if path.is_dir() and any(path.iterdir())]


def _sync(folder: Path) -> None:
    """Have all files of a folder on the disk before anything names it."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
