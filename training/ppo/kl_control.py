"""Holds PPO's divergence from the reference: a weight that adapts to a target, and a most at which training stops.

The weight moves as in Ziegler et al. 2019 (arXiv 1909.08593, section 2.2), ten times as fast, for trainings of tens of
updates: beta <- beta * (1 + clip(KL / target - 1, -0.2, 0.2)) after each update. What was logged decides it, so that a
resumed training goes on with the same weight.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_training.ppo.settings import PPOConfig

_MOST_ERROR = 0.2


class KlControl(TrainerCallback):
    """Adapts `kl_coef` to a target, and stops above a most.

    Args:
        target: Mean KL per completion to hold, in nats; None leaves the weight as it is.
        most: Mean KL of an update's batch above which training ends; None never ends it.
    """

    def __init__(self, target: float | None, most: float | None) -> None:
        self.target = target
        self.most = most

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Take up where a checkpoint left off."""
        measured = [row["objective/kl"] for row in state.log_history if "objective/kl" in row]
        for kl in measured:
            self._adapt(args, kl)
        if measured and self._is_too_far(measured[-1]):
            control.should_training_stop = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        """Log the weight that the update was trained with, then move it."""
        if logs and "objective/kl" in logs:
            if self.target is not None:
                logs["kl_coef"] = args.kl_coef
            self._adapt(args, logs["objective/kl"])
            if self._is_too_far(logs["objective/kl"]):
                control.should_training_stop = True
        return control

    def _adapt(self, args: PPOConfig, kl: float) -> None:
        if self.target is not None:
            error = kl / self.target - 1
            args.kl_coef *= 1 + min(_MOST_ERROR, max(-_MOST_ERROR, error))

    def _is_too_far(self, kl: float) -> bool:
        return self.most is not None and kl > self.most
