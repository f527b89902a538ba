"""The content that a run is held to: what it trains on, is measured on and starts from."""

import platform
from collections.abc import Iterable
from importlib import metadata
from typing import Any

from accelerate.utils import gather_object
from transformers import PreTrainedModel, TrainingArguments

from deepseek_records.exit_codes import SameInAllProcessesError
from deepseek_records.hashes import hash_model, hash_rows
from deepseek_records.run_folder import RunFolder


def hold_inputs(
    run: RunFolder, args: TrainingArguments, *, data: Any, held_out: Iterable[Any], model: PreTrainedModel | None
) -> None:
    """Keep the hashes of what a run trains on and starts from, or refuse to go on with something else.

    Args:
        run: The run.
        args: The trainer's arguments, which know the processes.
        data: The blocks, or rows, as the trainer gets them: texts as this tokenizer writes them.
        held_out: The rows that are measured on.
        model: What training starts from; None for a new one, which the settings tell all of.

    Raises:
        FileExistsError: The run was begun with something else under the same name.
        SameInAllProcessesError: A process has other inputs or versions than the first; raised in all.
    """
    known = getattr(data, "identity", None)  # of blocks; rows are hashed
    held = {"data": known or hash_rows(data), "held_out": hash_rows(held_out)}
    if model is not None and not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        held["model"] = hash_model(model)
    _check_agreement(held)
    with args.main_process_first(local=False):
        run.hold_to(**held)


def _check_agreement(held: dict[str, str]) -> None:
    """Refuse to train where a process has other inputs or versions than the first; all call it."""
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    first, *others = gather_object([{**held, **versions, "python": platform.python_version()}])
    for process, other in enumerate(others, 1):
        for name, value in other.items():
            if value != first[name]:
                raise SameInAllProcessesError(
                    f"{name.replace('_', ' ')}: got {value[:12]} in process {process}, expected {first[name][:12]} as "
                    "in process 0; all processes must have the same files and versions"
                )
