"""Router replay inside any trainer that generates and learns: PPO, TRL's GRPO and RLOO."""

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from deepseek_training.balance.callback import TRAINING_KEYS, add_to_log
from deepseek_training.balance.class_only import ClassOnly
from deepseek_training.balance.router_replay import RouterReplay


class RouterReplayCallback(TrainerCallback):
    """Replays the experts of each rollout while it is learned from, and logs ``router_replay_share``.

    Attributes:
        replay: What notes and replays, while a training runs.
    """

    def __init__(self) -> None:
        self.replay: RouterReplay | None = None

    @ClassOnly
    def attach(cls, trainer: Trainer) -> "RouterReplayCallback":
        """Make a callback, put it before the trackers of a trainer, which get its figure then, and return it.

        Args:
            trainer: Any trainer, before `train`.
        """
        callback = cls()
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Hook the model's routers."""
        self.replay = RouterReplay(model).attach()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log the share of the tokens learned from whose experts were replayed."""
        if self.replay is None or logs is None or not TRAINING_KEYS & logs.keys():
            return
        share = self.replay.take_share()
        if share is not None:
            add_to_log({"router_replay_share": share}, logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was."""
        if self.replay is not None:
            self.replay.detach()
            self.replay = None
