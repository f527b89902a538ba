"""The progress bar of the align stage."""

from typing import Any

from deepseek_training.trainer.run_callbacks import ProgressBar


class RewardBar(ProgressBar):
    """Shows updates, time left, and the last batch's reward and KL on one line."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the reward."""
        if self.bar is not None and logs and "objective/scores" in logs:
            self.bar.set_postfix(
                reward=f"{logs['objective/scores']:.3f}", kl=f"{logs['objective/kl']:.2f}", refresh=False
            )
