"""The folder of one update below its run, and the steps by which its model comes into force.

    updates/0001/   recipe.yaml, checkpoints/ while it trains, trained/ when it has, candidates/ while they are
    measured,
                    gates.json when it is decided, model/ and replay.npz if it is kept, summary.json at the end

Each of these appears whole, by a rename, and in this order, so that a process that is killed between any two leaves
the model in force as it was or as it is to be, and the same command goes on from the last that is there.
"""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_records.json_files import read_object
from deepseek_records.output_paths import make_output
from deepseek_records.run_files import CURRENT_LINK, GATES_FILE, MODEL_FOLDER, UPDATES_FOLDER, delete_run
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.run_lock import lock_run, unlock_run
from deepseek_training.continual.in_force import all_updates, base_of, current_model, point_to, update_of
from deepseek_training.continual.merge_weights import merge_weights

_ROLLED_BACK = "rolled_back.json"


def check_run(path: str | Path) -> Path:
    """Return a run folder whose model can be updated.

    Args:
        path: As the user gave it.

    Raises:
        FileNotFoundError: There is no finished run with a whole model.
        ValueError: It is an update of another run.
    """
    run = Path(path).absolute()
    if run.name == CURRENT_LINK or run.parent.name == UPDATES_FOLDER:
        raise ValueError(f"run: got {path}, expected the run that it belongs to, {Path(path).parent}")
    if not RunFolder(run).is_finished:
        raise FileNotFoundError(f"run: got {path}, expected the folder of a finished run (no summary.json in it)")
    if not (run / MODEL_FOLDER / "config.json").is_file():
        raise FileNotFoundError(f"run: {path} has no {MODEL_FOLDER}/config.json, expected a run that left a model")
    return run


@contextlib.contextmanager
def owning(run: Path) -> Iterator[None]:
    """Be the one process that writes updates of a run.

    Args:
        run: The run folder.

    Raises:
        FileExistsError: Another process is.
    """
    folder = make_output(run / UPDATES_FOLDER, "run")
    lock_run(folder)
    try:
        yield
    finally:
        unlock_run(folder)


def open_update(run: Path) -> RunFolder | None:
    """Return the update that was begun and not finished, None where there is none.

    Args:
        run: The run folder.
    """
    updates = all_updates(run)
    return updates[-1] if updates and not updates[-1].is_finished else None


def choose_folder(run: Path, settings: dict[str, Any]) -> Path:
    """Return the folder of the update to do: of the one that was begun, else the next.

    Args:
        run: The run folder.
        settings: Of the update.

    Raises:
        FileExistsError: One was begun with other settings.
    """
    begun = open_update(run)
    if begun is None:
        return run / UPDATES_FOLDER / f"{len(all_updates(run)) + 1:04d}"
    if not begun.has_only_begun():
        old = begun.settings
        changed = sorted(key for key in old.keys() | settings.keys() if old.get(key) != settings.get(key))
        if changed:
            raise FileExistsError(
                f"run: {begun.path} was begun with other settings ({', '.join(changed[:5])}); give the old ones to go "
                f"on, or drop it: deepseek-moe update {run} --discard"
            )
    return begun.path


def base_model(run: Path) -> Path:
    """Return the model that the update begins from: of one that was begun as it says, else the one in force.

    Args:
        run: The run folder.
    """
    begun = open_update(run)
    is_known = begun is not None and (begun.path / "recipe.yaml").is_file()
    return base_of(run, begun) if begun is not None and is_known else current_model(run)


def discard(run: Path) -> Path:
    """Delete the update that was begun, and return its folder.

    Args:
        run: The run folder.

    Raises:
        ValueError: None was begun, or it is in force already.
    """
    with owning(run):
        begun = open_update(run)
        if begun is None:
            raise ValueError(f"--discard: got {run} without an update that was begun and not finished, expected one")
        if current_model(run).parent == begun.path:
            raise ValueError(f"--discard: {begun.path} is in force already, expected one that is not; use --roll-back")
        delete_run(begun.path, hint="move it away")
    return begun.path


def roll_back(run: Path) -> Path:
    """Put the former model in force again, and return its folder.

    Args:
        run: The run folder.

    Raises:
        ValueError: The run's own model is in force.
    """
    with owning(run):
        update = update_of(run, current_model(run))
        if update is None:
            raise ValueError(f"--roll-back: got {run} with its own model in force, expected one that an update left")
        former = base_of(run, update)
        write_json(update.path / _ROLLED_BACK, {"at": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        point_to(run, former)
    return former


def candidate_folder(update: Path, base: Path, alpha: float) -> Path:
    """Return the folder of a candidate, written now unless it is there.

    Args:
        update: The update's folder.
        base: The old model.
        alpha: How far to the trained one.
    """
    folder = update / "candidates" / f"alpha-{alpha:g}"
    if not (folder / "config.json").is_file():
        merge_weights(base, update / "trained", folder, alpha)
    return folder


def read_decision(update: Path) -> dict[str, Any] | None:
    """Return what the gate said, None before.

    Args:
        update: The update's folder.
    """
    return read_object(update / GATES_FILE, "run") if (update / GATES_FILE).is_file() else None


def last_decision(run: Path) -> dict[str, Any]:
    """Return what the gate said of the last update.

    Args:
        run: The run folder.
    """
    decision = read_decision(all_updates(run)[-1].path)
    assert decision is not None, "an update that is finished was decided"
    return decision


def keep_candidate(update: Path, base: Path, alpha: float) -> Path:
    """Make the candidate the update's model, and return its folder.

    Args:
        update: The update's folder.
        base: The old model.
        alpha: Of the candidate.
    """
    model = update / MODEL_FOLDER
    if not (model / "config.json").is_file():
        candidate_folder(update, base, alpha).rename(model)
    return model


def promote(run: Path, update: Path) -> None:
    """Put an update's model in force, unless it was rolled back since.

    Args:
        run: The run folder.
        update: The update's folder, whole but for its summary.
    """
    if not (update / _ROLLED_BACK).is_file():
        point_to(run, update / MODEL_FOLDER)


def clean(update: Path) -> None:
    """Delete what only an unfinished update needs.

    Args:
        update: The folder of a finished one.
    """
    for name in ("trained", "trained.partial", "candidates", "checkpoints", "adapter"):
        shutil.rmtree(update / name, ignore_errors=True)
