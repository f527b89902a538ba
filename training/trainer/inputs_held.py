"""The content that a run is held to: what it trains on, is measured on and starts from."""

from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel, TrainingArguments

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
    """
    known = getattr(data, "identity", None)  # of blocks; rows are hashed
    held = {"data": known or hash_rows(data), "held_out": hash_rows(held_out)}
    if model is not None and not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        held["model"] = hash_model(model)
    with args.main_process_first(local=False):
        run.hold_to(**held)
