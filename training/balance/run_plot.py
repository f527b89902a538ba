"""When a run's pictures are drawn: at each checkpoint and at the end, by the process that writes the run folder."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_records.run_folder import RunFolder


class RunPlot(TrainerCallback):
    """Redraws a picture whenever a checkpoint is written, and at the end; a subclass draws.

    Args:
        run: The run.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def draw(self) -> None:
        """Draw what the run has logged so far."""
        raise NotImplementedError

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Draw what the run has logged so far."""
        if state.is_world_process_zero:
            self.draw()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Draw the whole run."""
        self.on_save(args, state, control)
