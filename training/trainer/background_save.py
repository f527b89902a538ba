"""Checkpoints that are written while the training goes on, by torch's `async_save`.

Each process copies its part, and the training goes on while a thread writes the copy. When the threads of all
processes are done, the checkpoint gets its name; until then, and where one fails or is killed, the checkpoint before
stands. Without a stager of its own `async_save` (torch 2.13) copies nothing that lies on a CPU, and would
write the weights of a later step.
"""

import datetime
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_training.trainer.checkpoints import publish_checkpoint
from deepseek_training.trainer.split_checkpoint import telling_of_failed_parts

_COPY = StagingOptions(
    use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
)


class BackgroundSave:
    """The checkpoint that is being written; one at a time.

    Args:
        timeout_s: How long a thread waits for those of the other processes.
    """

    def __init__(self, timeout_s: int) -> None:
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._groups: list[Any] = []
        self._writing: list[tuple[Future[Any], DefaultStager]] = []
        self._checkpoint: Path | None = None

    def write(self, state: dict[str, Any], checkpoint: Path, **where: Any) -> None:
        """Copy a part of the state and have it written; all processes call it, in the same order.

        Args:
            state: Tensors, parts of tensors and numbers.
            checkpoint: The folder that `publish_when_written` renames.
            **where: As for `torch.distributed.checkpoint.save`.
        """
        number = len(self._writing)
        if number == len(self._groups):
            # Threads of one group would take one another's messages for their own.
            self._groups.append(torch.distributed.new_group(backend="gloo", timeout=self._timeout))
        stager = DefaultStager(_COPY)
        with telling_of_failed_parts(checkpoint):
            saving = dcp.async_save(state, process_group=self._groups[number], async_stager=stager, **where)
        self._writing.append((saving, stager))
        self._checkpoint = checkpoint

    def publish_when_written(self, *, is_first: bool, device: torch.device, wait: bool) -> None:
        """Give the checkpoint its name if all processes have written it; all call it.

        Args:
            is_first: Whether this process renames.
            device: Of the tensor that the processes exchange.
            wait: Until it is written; otherwise a checkpoint that is not is left for a later call.

        Raises:
            RunFailedError: A process could not write its part; the checkpoint before stands.
        """
        if self._checkpoint is None:
            return
        if not wait:
            is_open = torch.tensor(int(not all(saving.done() for saving, _ in self._writing)), device=device)
            torch.distributed.all_reduce(is_open, op=torch.distributed.ReduceOp.MAX)
            if is_open:
                return
        writing, checkpoint = self._writing, self._checkpoint
        self._writing, self._checkpoint = [], None
        with telling_of_failed_parts(checkpoint):
            for saving, stager in writing:
                saving.result()
                stager.close()
        publish_checkpoint(checkpoint, is_first=is_first)


class PublishWhenWritten(TrainerCallback):
    """Looks after each step whether a checkpoint is written, and waits for the last one.

    Args:
        trainer: A stage's.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Publish it if it is written."""
        self.trainer.finish_saving(wait=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for it."""
        self.trainer.finish_saving(wait=True)


def check_background(trainer: Any) -> None:
    """Refuse to save in the background where one process writes a checkpoint whole.

    Args:
        trainer: A stage's.

    Raises:
        ValueError: It does.
    """
    if trainer.is_saved_in_background and not (trainer.writes_parts and trainer.args.world_size > 1):
        raise ValueError(
            "save_in_background: got True, expected false where one process writes a checkpoint whole; several write "
            "it in parts under fsdp2_sharded.yaml and with expert_parallel_size above 1"
        )
