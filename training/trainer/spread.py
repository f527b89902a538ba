"""How a run is spread over processes, and what of that may change when it goes on.

A step's rows, batch size x passes x processes, stay what they were: the same rows are then trained on in the same
order, whatever the number of processes. A checkpoint says who wrote it; what its engine cannot load is refused before
the engine fails in words of its own.
"""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from deepseek_records.json_files import read_object
from deepseek_records.run_folder import RunFolder, write_json

# Settings that say how a step is spread and saved; the run folder lets them change, `hold_step` keeps its rows.
SPREAD_SETTINGS = ("batch_size", "gradient_accumulation_steps", "expert_parallel_size", "save_in_background")
WRITER_FILE = "written_by.json"


def rows_per_step(recipe: Any, args: TrainingArguments) -> int:
    """Return the rows of an optimizer step, or prompts of an update, of all processes.

    Args:
        recipe: A stage's.
        args: The trainer's arguments, which know the processes.
    """
    return recipe.batch_size * getattr(recipe, "gradient_accumulation_steps", 1) * args.world_size


def hold_step(run: RunFolder, recipe: Any, args: TrainingArguments) -> None:
    """Refuse to go on with another number of rows per step; the first process keeps it for later.

    Args:
        run: The run.
        recipe: A stage's.
        args: The trainer's arguments, which know the processes.

    Raises:
        FileExistsError: The run was begun with another.
    """
    rows, begun = rows_per_step(recipe, args), run.inputs.get("rows_per_step")
    if begun is not None and begun != str(rows):
        raise FileExistsError(
            f"batch_size: got {rows} rows per step (batch_size x gradient_accumulation_steps x processes), expected "
            f"{begun}, with which {run.path} was begun; change batch_size so that it stays, or pass another --output"
        )
    if args.process_index == 0:
        run.hold_to(rows_per_step=str(rows))


def engine_name(trainer: Any) -> str:
    """Return what trains: ``fsdp2``, ``zero3``, ``expert_parallel``, or ``whole`` where every process has all.

    ``fsdp2_sharded`` is FSDP2 of which each process writes its part of a checkpoint.

    Args:
        trainer: A stage's.
    """
    if trainer.is_fsdp_enabled:
        return "fsdp2_sharded" if trainer.writes_parts else "fsdp2"
    if trainer.is_deepspeed_enabled:
        return "zero3"
    return "expert_parallel" if trainer.is_sharded else "whole"


def write_writer(checkpoint: Path, trainer: Any) -> None:
    """Note in a checkpoint which engine wrote it, in how many processes.

    Args:
        checkpoint: The folder.
        trainer: A stage's.
    """
    write_json(checkpoint / WRITER_FILE, {"engine": engine_name(trainer), "processes": trainer.args.world_size})


def check_writer(checkpoint: Path, trainer: Any) -> None:
    """Raise a one-line ValueError if this training cannot go on from a checkpoint.

    Args:
        checkpoint: The folder; one of an earlier version, which says nothing, is taken.
        trainer: A stage's.
    """
    if not (checkpoint / WRITER_FILE).is_file():
        return
    writer = read_object(checkpoint / WRITER_FILE, "checkpoint")
    engine, processes = engine_name(trainer), trainer.args.world_size
    if writer["engine"] != engine:
        raise ValueError(f"engine: got {engine}, expected {writer['engine']}, which wrote {checkpoint}")
    if engine == "zero3" and writer["processes"] != processes:
        raise ValueError(
            f"processes: got {processes}, expected {writer['processes']}, which wrote {checkpoint} (DeepSpeed "
            "loads it in no other number)"
        )
