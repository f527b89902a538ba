"""The run folder's side of a training: ``metrics.jsonl`` and the progress bar."""

import json
import math
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_records.run_folder import METRICS_FILE, RunFolder, write_text
from deepseek_training.balance.training_figures import TrainingFigures

# TRL's PPO names of figures that the card and the report read under the names of the other stages.
_ALSO_CALLED = {
    "objective/scores": "reward",
    "objective/kl": "kl",
    "policy/entropy_avg": "entropy",
    "lr": "learning_rate",
}


class MetricsFile(TrainerCallback):
    """Writes each line of a trainer's log into the run folder; the closing line of times is left to the summary.

    Args:
        run: The run.
        figures: Whose load of the experts, too large for a tracker, goes into the file too.
    """

    def __init__(self, run: RunFolder, figures: TrainingFigures | None = None) -> None:
        self.run = run
        self.figures = figures

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append the line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        row = {"step": state.global_step, **{key: finite_or_none(value) for key, value in logs.items()}}
        row.update({other: row[name] for name, other in _ALSO_CALLED.items() if name in row})
        if "loss" in logs and self.figures is not None and self.figures.tokens_per_expert:
            row["tokens_per_expert"] = self.figures.tokens_per_expert
        self.run.log(row)


class ProgressBar(TrainerCallback):
    """Shows steps, time left and the last loss on one line."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step the run starts from."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc=self.description, unit="step", mininterval=0.5
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move on by one."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, so that an error gets a line of its own."""
        if self.bar is not None:
            self.bar.close()


def drop_metrics_after(run: RunFolder, step: int) -> None:
    """Leave only the lines up to a step, for a resumed run writes the later ones again.

    Args:
        run: The run.
        step: The step of the checkpoint it goes on from.
    """
    if not (run.path / METRICS_FILE).exists():
        return
    rows = [row for row in run.metrics if row["step"] <= step]
    write_text(run.path / METRICS_FILE, "".join(json.dumps(row) + "\n" for row in rows))


def log_once(run: RunFolder, row: dict[str, Any]) -> None:
    """Append a line that stands outside the training, unless an earlier, interrupted attempt has left it there.

    Args:
        run: The run.
        row: The line, with its ``step``.
    """
    if not any(other["step"] == row["step"] and other.keys() == row.keys() for other in run.metrics):
        run.log(row)


def finite_or_none(value: Any) -> Any:
    """Return None in place of a number that JSON has no word for, all else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
