"""Checkpoints of a model that is split over processes: every process writes its own part.

By torch's distributed checkpoints, as transformers wraps them, which put the parts together for any number of
processes: under expert parallelism, and under FSDP2 with SHARDED_STATE_DICT. `Trainer` (5.23) writes the first
process's part of the optimizer's state as if it were all, cannot load whole weights into parts, and with
SHARDED_STATE_DICT ends without a model.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from deepseek_records.checkpoint_parts import join_parts
from deepseek_records.exit_codes import RunFailedError
from deepseek_training.recipes.pretrain_and_adapt import AdaptRecipe, PretrainRecipe
from modeling_deepseek import DeepseekForCausalLM

with contextlib.suppress(ImportError):  # transformers 5.17 splits no model
    from transformers.distributed.checkpoint import (
        _load_model_checkpoint_distributed,
        load_optimizer_distributed,
        save_optimizer_distributed,
    )

OPTIMIZER_FOLDER = "optimizer"


def check_parts(trainer: Any) -> None:
    """Refuse to write parts under FSDP2 where they would not be joined to the model that was trained.

    Args:
        trainer: A stage's.

    Raises:
        ValueError: It is another stage than `pretrain` and `adapt`, an adapter, or not a model of ours alone.
    """
    if not (trainer.is_fsdp_enabled and trainer.writes_parts):
        return
    model = trainer.model
    is_ours = isinstance(model, DeepseekForCausalLM) and not model._carried_mtp
    if not (isinstance(trainer.recipe, (PretrainRecipe, AdaptRecipe)) and is_ours):
        raise ValueError(
            "fsdp_state_dict_type: got SHARDED_STATE_DICT, which pretrain and adapt take for a deepseek_moe model, "
            "without LoRA and without carried prediction layers; expected FULL_STATE_DICT (fsdp2.yaml)"
        )


@contextlib.contextmanager
def saving_otherwise(args: TrainingArguments, model: PreTrainedModel | None) -> Iterator[None]:
    """Let a `Trainer` of a split model be built that will save more than weights.

    transformers (5.23) refuses it, because its own `Trainer` cannot.

    Args:
        args: The trainer's arguments; unchanged afterwards.
        model: The trainer's. Where FSDP2 will split it later, transformers refuses the contrary.
    """
    if model is None or not _was_split_on_loading(model):
        yield
        return
    wanted, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = wanted


@contextlib.contextmanager
def telling_of_failed_parts(checkpoint: Path) -> Iterator[None]:
    """Raise a one-line error in every process where one could not write its part; torch's is a `BaseException`.

    Args:
        checkpoint: What is written.

    Raises:
        RunFailedError: A process could not; the former checkpoint stands.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        said = next(iter(str(cause).splitlines()), type(cause).__name__)
        raise RunFailedError(
            f"checkpoint: process {rank} could not write its part of {checkpoint.name}, is the disk full? ({said}); "
            "the same command goes on from the checkpoint before"
        ) from error


def save_split_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Write every process's part of the weights; all call it.

    Args:
        model: Split while it was loaded, or by FSDP2.
        checkpoint: The folder.
    """
    if _was_split_on_loading(model):
        with telling_of_failed_parts(checkpoint):
            model.save_pretrained(checkpoint, distributed_checkpoint=True)
        return
    checkpoint.mkdir(parents=True, exist_ok=True)
    if torch.distributed.get_rank() == 0:  # everything but the weights
        model.save_pretrained(checkpoint, state_dict={})
        (checkpoint / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    torch.distributed.barrier()
    with telling_of_failed_parts(checkpoint):
        dcp.save(_untied(model), storage_writer=HuggingFaceStorageWriter(str(checkpoint), save_distributed=True))


def save_joined(model: PreTrainedModel, folder: Path) -> None:
    """Write a whole model that no process holds: each writes its part, and the first puts them together; all call it.

    Args:
        model: Split by FSDP2.
        folder: Replaced when the model is whole.
    """
    parts = folder.with_name(f"{folder.name}.parts")
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(parts, ignore_errors=True)  # of a run that was stopped here
    torch.distributed.barrier()
    save_split_weights(model, parts)
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
        join_parts(parts, folder)
        shutil.rmtree(parts)


def load_split_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Read what `save_split_weights` wrote, in as many processes or others; all call it.

    Args:
        model: Split as for `save_split_weights`; changed in place.
        checkpoint: The folder.
    """
    if _was_split_on_loading(model):
        _load_model_checkpoint_distributed(model, checkpoint)
        return
    state = _untied(model)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    set_model_state_dict(model, state, options=StateDictOptions(strict=False))


def _was_split_on_loading(model: PreTrainedModel) -> bool:
    return getattr(model.config, "distributed_config", None) is not None


def _untied(model: PreTrainedModel) -> dict[str, Any]:
    """The parts of weights and buffers in this process; of tied ones the first, for safetensors holds none twice."""
    state = get_model_state_dict(model)
    return {name: value for name, value in state.items() if name not in model.all_tied_weights_keys}


def save_split_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Write every process's part of the optimizer's state; all call it.

    Args:
        model: Split as for `save_split_weights`.
        optimizer: Of its parameters.
        checkpoint: The folder.
    """
    with telling_of_failed_parts(checkpoint):
        save_optimizer_distributed(model, optimizer, str(checkpoint / OPTIMIZER_FOLDER))


def load_split_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Read what `save_split_optimizer` wrote, in as many processes or others; all call it.

    Args:
        model: Split as for `save_split_weights`.
        optimizer: Of its parameters; changed in place.
        checkpoint: The folder.
    """
    load_optimizer_distributed(model, optimizer, str(checkpoint / OPTIMIZER_FOLDER))
