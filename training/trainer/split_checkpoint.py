"""Checkpoints of a model whose experts are split over processes: every process writes its own part.

By torch's distributed checkpoints, as transformers wraps them, which put the parts together for any number of
processes. `Trainer` (5.23) writes the first process's part of the optimizer's state as if it were all, and cannot load
whole weights into parts.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainingArguments

with contextlib.suppress(ImportError):  # transformers 5.17 splits no model
    from transformers.distributed.checkpoint import (
        _load_model_checkpoint_distributed,
        load_optimizer_distributed,
        save_optimizer_distributed,
    )

OPTIMIZER_FOLDER = "optimizer"


@contextlib.contextmanager
def saving_otherwise(args: TrainingArguments) -> Iterator[None]:
    """Let a `Trainer` of a split model be built that will save more than weights.

    transformers (5.23) refuses it, because its own `Trainer` cannot.

    Args:
        args: The trainer's arguments; unchanged afterwards.
    """
    wanted, args.save_only_model = args.save_only_model, True
    try:
        yield
    finally:
        args.save_only_model = wanted


def save_split_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Write every process's part of the weights; all call it.

    Args:
        model: Split while it was loaded.
        checkpoint: The folder.
    """
    model.save_pretrained(checkpoint, distributed_checkpoint=True)


def load_split_weights(model: PreTrainedModel, checkpoint: Path) -> None:
    """Read what `save_split_weights` wrote, in as many processes or others; all call it.

    Args:
        model: Split while it was loaded; changed in place.
        checkpoint: The folder.
    """
    _load_model_checkpoint_distributed(model, checkpoint)


def save_split_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Write every process's part of the optimizer's state; all call it.

    Args:
        model: Split while it was loaded.
        optimizer: Of its parameters.
        checkpoint: The folder.
    """
    save_optimizer_distributed(model, optimizer, str(checkpoint / OPTIMIZER_FOLDER))


def load_split_optimizer(model: PreTrainedModel, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Read what `save_split_optimizer` wrote, in as many processes or others; all call it.

    Args:
        model: Split while it was loaded.
        optimizer: Of its parameters; changed in place.
        checkpoint: The folder.
    """
    load_optimizer_distributed(model, optimizer, str(checkpoint / OPTIMIZER_FOLDER))
