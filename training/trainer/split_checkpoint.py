"""Checkpoints of a model that is split over processes: every process writes its own part.

By torch's distributed checkpoints, which put the parts together for any number of processes: under expert
parallelism, and under FSDP2 with SHARDED_STATE_DICT. `Trainer` (5.23) writes the first process's part of the
optimizer's state as if it were all, cannot load whole weights into parts, and with SHARDED_STATE_DICT ends without a
model.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from deepseek_records.checkpoint_parts import join_parts
from deepseek_records.exit_codes import RunFailedError
from modeling_deepseek import DeepseekForCausalLM

OPTIMIZER_FOLDER = "optimizer"
# Writes a state: the state, its checkpoint, and where in it.
WriteParts = Callable[..., None]
# By names, which do not depend on how many parameters of a group this process has.
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)


def check_parts(trainer: Any) -> None:
    """Refuse to write parts under FSDP2 where they would not be joined to the model that was trained.

    Args:
        trainer: A stage's.

    Raises:
        ValueError: It is not a model of ours alone; or it is an adapter, and the checkpoints are whole.
    """
    if trainer.is_fsdp_enabled and not trainer.writes_parts and isinstance(trainer.model, PeftModel):
        raise ValueError(
            "fsdp_state_dict_type: got FULL_STATE_DICT with LoRA, expected SHARDED_STATE_DICT (fsdp2_sharded.yaml); "
            "transformers cannot read a whole checkpoint into an adapter in parts"
        )
    if not (trainer.is_fsdp_enabled and trainer.writes_parts):
        return
    model = trainer.model.get_base_model() if isinstance(trainer.model, PeftModel) else trainer.model
    if not isinstance(model, DeepseekForCausalLM) or model._carried_mtp:
        raise ValueError(
            "fsdp_state_dict_type: got SHARDED_STATE_DICT, which is for a deepseek_moe model without carried "
            "prediction layers; expected FULL_STATE_DICT (fsdp2.yaml)"
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


def write_parts(state: dict[str, Any], checkpoint: Path, **where: Any) -> None:
    """Write every process's part of a state, and return when all are written; all call it.

    Args:
        state: Tensors, parts of tensors and numbers.
        checkpoint: The folder, for a message.
        **where: As for `torch.distributed.checkpoint.save`.
    """
    with telling_of_failed_parts(checkpoint):
        dcp.save(state, **where)


def save_split_weights(model: PreTrainedModel, checkpoint: Path, write: WriteParts = write_parts) -> None:
    """Write every process's part of the weights; all call it.

    Args:
        model: Split while it was loaded, or by FSDP2.
        checkpoint: The folder.
        write: Writes now, or in the background.
    """
    checkpoint.mkdir(parents=True, exist_ok=True)
    if isinstance(model, PeftModel):
        model.peft_config[model.active_adapter].save_pretrained(checkpoint)
    else:
        model.save_pretrained(checkpoint, state_dict={})  # everything but the weights, by the first process
    if torch.distributed.get_rank() == 0:
        (checkpoint / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)
    torch.distributed.barrier()
    storage = HuggingFaceStorageWriter(str(checkpoint), save_distributed=True)
    write(_in_one_piece(stored_state(model)), checkpoint, storage_writer=storage)


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
    placed = stored_state(model)
    state = _in_one_piece(placed)
    dcp.load(state, storage_reader=HuggingFaceStorageReader(str(checkpoint)))
    set_model_state_dict(model, _placed_as(placed, state), options=StateDictOptions(strict=False))


def _was_split_on_loading(model: PreTrainedModel) -> bool:
    return getattr(model.config, "distributed_config", None) is not None


def stored_state(model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Return the parts of weights and buffers in this process that a checkpoint holds; all processes call it.

    Of tied weights the first, for safetensors holds none twice; of a model with an adapter what is not frozen, for the
    rest is the model that the run started from.

    Args:
        model: Split while it was loaded, or by FSDP2.
    """
    left_out = set(model.all_tied_weights_keys)
    if isinstance(model, PeftModel):
        left_out |= {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in get_model_state_dict(model).items() if name not in left_out}


def save_split_optimizer(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path, write: WriteParts = write_parts
) -> None:
    """Write every process's part of the optimizer's state; all call it.

    Args:
        model: Split as for `save_split_weights`.
        optimizer: Of its parameters.
        checkpoint: The folder.
        write: As for `save_split_weights`.
    """
    state = _in_one_piece(get_optimizer_state_dict(model, optimizer, options=_BY_NAME))
    write({"optimizer": state}, checkpoint, checkpoint_id=str(checkpoint / OPTIMIZER_FOLDER))


def load_split_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Read what `save_split_optimizer` wrote, in as many processes or others; all call it.

    Args:
        model: Split as for `save_split_weights`.
        optimizer: Of its parameters; changed in place.
        checkpoint: The folder.
    """
    placed = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    state = _in_one_piece(placed)
    dcp.load({"optimizer": state}, checkpoint_id=str(checkpoint / OPTIMIZER_FOLDER))
    set_optimizer_state_dict(model, optimizer, _placed_as(placed, state), options=_BY_NAME)


def _in_one_piece(state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with each process's part of a tensor in one piece.

    Where two ways of splitting meet, a part is strided; torch (2.13) would write its rows as if they were neighbors.
    """

    def place(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        return value.redistribute(
            placements=[Shard(p.dim) if isinstance(p, _StridedShard) else p for p in value.placements]
        )

    return tree_map(place, state)


def _placed_as(placed: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    """Return the state with its tensors split as those of `placed`."""

    def place(like: Any, value: Any) -> Any:
        return value.redistribute(placements=like.placements) if isinstance(like, DTensor) else value

    return tree_map(place, placed, state)
