"""Checkpoints that a resumed run can trust.

`transformers.Trainer` writes a checkpoint file by file, so a killed run may leave one cut short. The stages have it
write under a temporary name; `publish_checkpoint` lists the files and their sizes once every process has written all,
and renames the folder. `last_complete_checkpoint` takes only folders whose list still holds, and names the others.
`load_weights` reads a model back, for every stage's way of resuming.
"""

import json
import logging
import re
import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from deepseek_records.run_folder import write_json
from deepseek_training.mtp.stock_mtp import train_mtp
from deepseek_training.mtp.trained_class import TrainsMtp
from modeling_deepseek.modeling_deepseek import DeepseekPreTrainedModel

MARKER_FILE = "complete.json"
# Beside the checkpoints, with the one that is not whole yet.
BEING_WRITTEN = "being_written"
_INCOMPLETE = "%s is incomplete (the run was stopped while writing it); it is deleted"
_NAME = re.compile(r"checkpoint-(\d+)")
logger = logging.getLogger(__name__)


def publish_checkpoint(written: Path, *, is_first: bool) -> None:
    """Mark a checkpoint as complete, give it its name and delete the older ones; all processes call it.

    `Trainer`'s own `save_total_limit` would delete the last good checkpoint before its successor is marked.

    Args:
        written: The folder, in `BEING_WRITTEN` beside the others.
        is_first: Whether this process does it.
    """
    wait_for_all()  # every process has written its part
    if is_first:
        mark_complete(written)
        checkpoint = written.parents[1] / written.name
        if checkpoint.exists():
            shutil.rmtree(checkpoint)
        written.rename(checkpoint)
        written.parent.rmdir()
        for older in checkpoint.parent.glob("checkpoint-*"):
            if _NAME.fullmatch(older.name) and step_of(older) < step_of(checkpoint):
                shutil.rmtree(older)
    wait_for_all()  # or another could take what is not renamed yet for the rest of a stopped run


def wait_for_all() -> None:
    """Wait until every process is here; one alone goes on."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def mark_complete(checkpoint: Path) -> None:
    """Write the list of files and sizes that makes a checkpoint complete.

    Args:
        checkpoint: The folder, finished in every other way.
    """
    write_json(checkpoint / MARKER_FILE, _file_sizes(checkpoint))


def is_complete(checkpoint: Path) -> bool:
    """Return whether the folder holds every file its marker lists, at its size."""
    try:
        listed = json.loads((checkpoint / MARKER_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    found = _file_sizes(checkpoint)
    return all(found.get(name) == size for name, size in listed.items())


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint of the highest step, or None; incomplete ones are named and deleted.

    Args:
        folder: Where ``checkpoint-STEP`` folders lie; it need not exist.
    """
    if not folder.is_dir():
        return None
    for path in (folder / BEING_WRITTEN).glob("checkpoint-*"):
        logger.warning(_INCOMPLETE, path)
    shutil.rmtree(folder / BEING_WRITTEN, ignore_errors=True)  # several processes may do so at once
    checkpoints = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    complete = []
    for path in sorted(checkpoints, key=step_of):
        if is_complete(path):
            complete.append(path)
        else:
            logger.warning(_INCOMPLETE, path)
            shutil.rmtree(path, ignore_errors=True)
    return complete[-1] if complete else None


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step in a checkpoint folder's name."""
    return int(_NAME.fullmatch(checkpoint.name).group(1))


def load_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy a saved model's weights and buffers into this one, through `from_pretrained`.

    `Trainer` (5.23) hands the file to `load_state_dict`, which knows nothing of the per-expert names that
    `save_pretrained` writes: the experts would silently keep their initial values.

    Args:
        model: Changed in place.
        folder: Where a model of the same class and settings was saved.
    """
    kept = {}
    if isinstance(model, DeepseekPreTrainedModel):  # loading sets it to 0 and leaves the prediction layers out
        kept["mtp_loss_coef"] = model.config.mtp_loss_coef
    saved = type(model).from_pretrained(folder, dtype=model.dtype, **kept)
    if isinstance(model, TrainsMtp):  # of a stock model transformers drops them
        train_mtp(saved)
    model.load_state_dict(saved.state_dict())


def _file_sizes(checkpoint: Path) -> dict[str, int]:
    files = (path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MARKER_FILE)
    return {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
