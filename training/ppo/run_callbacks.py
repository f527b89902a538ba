"""The align stage's side of a training: ``metrics.jsonl`` and the progress bar."""

from typing import Any

from transformers import TrainerCallback

from deepseek_records.run_folder import RunFolder
from deepseek_training.trainer.run_callbacks import ProgressBar, finite_or_none


class LogToRunFolder(TrainerCallback):
    """Writes each line of the trainer's log into the run folder, TRL's names and those the card and report read.

    Args:
        run: The run.
    """

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Append the line."""
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **{name: finite_or_none(value) for name, value in logs.items()}}
        if "objective/scores" in logs:
            row["reward"], row["kl"] = row["objective/scores"], row["objective/kl"]
            row["entropy"], row["learning_rate"] = row["policy/entropy_avg"], row["lr"]
        self.run.log(row)


class RewardBar(ProgressBar):
    """Shows updates, time left, and the last batch's reward and KL on one line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the reward."""
        if self.bar is not None and logs and "objective/scores" in logs:
            self.bar.set_postfix(
                reward=f"{logs['objective/scores']:.3f}", kl=f"{logs['objective/kl']:.2f}", refresh=False
            )
