"""Ctrl-C and SIGTERM in a stage: the step under way is finished, a checkpoint written, and the way on is told.

A step in progress is never cut in two. Measurements and PPO's generation stop at once, for the last whole step is all
there is to keep. Of several processes all stop after the same step.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_records.run_folder import RunFolder
from deepseek_records.stop_signals import StopSignals, deferred, stop_signals
from deepseek_training.trainer.checkpoints import is_complete, last_complete_checkpoint, step_of


class StopAfterStep(TrainerCallback):
    """Logs, saves and stops after the step in which a signal came. The last of the callbacks.

    Args:
        stop: Knows of the signal.
    """

    def __init__(self, stop: StopSignals) -> None:
        self.stop = stop

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the end, where any process got a signal."""
        if _any_process(self.stop.number is not None, args.device):
            control.should_log = True  # of the steps since the last line, which a resumed run does not know
            control.should_evaluate = False
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for the end, where a signal came while the checkpoint was written."""
        if _any_process(self.stop.number is not None, args.device):
            control.should_training_stop = True
        return control


def _any_process(value: bool, device: torch.device) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    flag = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag)


def train_until_stopped(trainer: Any, checkpoint: str | Path | None) -> None:
    """Train from a checkpoint, or from the start without one, until the end or a signal.

    Args:
        trainer: A stage's.
        checkpoint: The folder.

    Raises:
        Interrupted: A signal came; what was trained is saved.
    """
    with deferred() as stop:
        trainer.add_callback(StopAfterStep(stop))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        stop.check()


@contextlib.contextmanager
def leaving_a_checkpoint(trainer: Any, run: RunFolder) -> Iterator[None]:
    """Where a signal stops what is inside, make sure that the last whole step is saved, and tell how to go on.

    Args:
        trainer: A stage's.
        run: Its run folder.
    """
    with stop_signals() as stop:
        try:
            yield
        except KeyboardInterrupt as error:
            # Without a signal of ours nobody knows whether a step was cut in two.
            if stop.number is not None and int(os.environ.get("WORLD_SIZE", "1")) == 1:
                _save_if_missing(trainer)
            error.args = (describe_interruption(run),)
            raise


def _save_if_missing(trainer: Any) -> None:
    step = trainer.state.global_step
    if step and not is_complete(Path(trainer.args.output_dir) / f"checkpoint-{step}"):
        trainer._save_checkpoint(trainer.model, trial=None)
        trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)


def describe_interruption(run: RunFolder) -> str:
    """Return one line on how to go on after a signal."""
    checkpoint = last_complete_checkpoint(run.path / "checkpoints")
    start = f"step {step_of(checkpoint)}" if checkpoint else "the beginning (no step was saved yet)"
    return f"run the same command again to go on from {start} in {run.path}"
