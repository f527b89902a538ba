"""Expert balancing inside any transformers Trainer: one callback.

Pass `ExpertBalanceCallback()` to `Trainer`, to TRL's trainers, or call its hooks from a loop of your own. After each
optimizer step it adds up the routers' counts over all ranks, moves the balancing biases and expert shares, and keeps
figures for the log. Surprising: the auxiliary losses need no callback for their existence, only to know over how many
passes a step is accumulated; without one a model trains correctly, with less balancing, and says so once. And it moves
itself to the front of the trainer's callbacks, or trackers would read the log before it has written its figures.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from deepseek_training.balance.callback_order import move_before_trackers, passes_of_this_step
from deepseek_training.balance.router_figures import RouterWindow, router_figures

logger = logging.get_logger(__name__)

# What a line of the log on training has, of one on evaluation or on the whole run has not; the second is TRL's PPO's.
TRAINING_KEYS = frozenset({"loss", "loss/policy_avg"})


class ExpertBalanceCallback(TrainerCallback):
    """Balances the experts of a `modeling_deepseek` model while it trains.

    Args:
        bias_update_speed: In place of the model's `router_bias_update_speed`, which it leaves as it is, also in what
            is saved (DeepSeek-V3: 0.001); None takes the model's. A loaded checkpoint's is 0 unless asked for.

    Attributes:
        tokens_per_expert: `[L, E]` int64 on the CPU: the load of each MoE layer since the last log, over all ranks.
        history: One dict a log: step, the figures also added to the Trainer's log, and `tokens_per_expert` as lists.
    """

    reads_before_trackers = True

    def __init__(self, bias_update_speed: float | None = None) -> None:
        if bias_update_speed is not None and not 0 <= bias_update_speed < math.inf:
            raise ValueError(f"bias_update_speed: {bias_update_speed} is not allowed, want at least 0")
        self.bias_update_speed = bias_update_speed
        self.tokens_per_expert: torch.Tensor | None = None
        self.history: list[dict[str, Any]] = []
        self._window: torch.Tensor | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the routers how many passes make a step.

        Args:
            args: Training arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: Unused.
        """
        move_before_trackers(self)
        routers = find_routers(model)
        if not routers:
            logger.warning("ExpertBalanceCallback: %s has no router of ours; nothing to balance", type(model).__name__)
        for router in routers:
            router.load.reset()
            router.load.num_accumulation_steps = args.gradient_accumulation_steps
        self._window = None
        _warn_of_lost_state(model, self.bias_update_speed)
        _warn_of_fp16(args, model)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell the routers how many passes make this step: an epoch's last may have fewer.

        Args:
            args: Training arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: Unused.
        """
        num_passes = passes_of_this_step(args)
        for router in find_routers(model):
            router.load.num_accumulation_steps = num_passes

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Update biases and shares.

        Args:
            args: Training arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: Unused.
        """
        self.finish_step(model)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Do likewise for trainers that do not announce optimizer steps (TRL's PPO).

        Args:
            args: Training arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: Unused.
        """
        if any(router.load.num_passes for router in find_routers(model)):
            self.finish_step(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the window's figures to the log.

        Args:
            args: Training arguments.
            state: The trainer's state; its last log entry gets the figures too.
            control: The trainer's control.
            logs: What is being logged.
            model: The model.
            **kwargs: Unused.
        """
        if self._window is None or logs is None or TRAINING_KEYS.isdisjoint(logs):
            return
        routers = find_routers(model)
        windows = [RouterWindow.from_row(row, router) for row, router in zip(self._window, routers, strict=True)]
        self.tokens_per_expert = torch.stack([window.tokens_per_expert for window in windows])
        figures = router_figures(windows)
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        load = self.tokens_per_expert.tolist()
        self.history.append({"step": state.global_step, **figures, "tokens_per_expert": load})
        self._window = None

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Take back what `on_train_begin` told.

        Args:
            args: Training arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: Unused.
        """
        for router in find_routers(model):
            router.load.num_accumulation_steps = None

    @torch.no_grad()
    def finish_step(self, model: nn.Module) -> None:
        """Sum the counts over all ranks and have every router update itself.

        Args:
            model: The model, wrapped or not.
        """
        routers = find_routers(model)
        if not routers:
            return
        counts = torch.stack([router.load.as_row(router.e_score_correction_bias.device) for router in routers])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        counts = counts.cpu()  # the step's only wait for the GPU
        for router, row in zip(routers, counts, strict=True):
            router.finish_step(row[: router.num_experts], int(row[-1]), self.bias_update_speed)
        if self._window is None or self._window.shape != counts.shape:
            self._window = torch.zeros_like(counts)
        self._window += counts


def find_routers(model: nn.Module | None) -> list[nn.Module]:
    """Return a model's routers in order of layers.

    Found by what they can do, not by class: a checkpoint's own copy of the model's files makes another class. Asked of
    their class and their own attributes, for PEFT's wrapper answers for what it wraps; and where it has made a copy of
    a router to train, the original no longer routes.

    Args:
        model: Any module.
    """
    if model is None:
        return []
    return [
        module
        for name, module in model.named_modules()
        if hasattr(type(module), "finish_step") and "load" in vars(module) and not name.endswith(".original_module")
    ]


def _warn_of_lost_state(model: nn.Module, speed: float | None) -> None:
    """Say so if what moves in the routers is no part of the adapter that PEFT saves."""
    if not hasattr(model, "peft_config"):
        return
    names = {module: name for name, module in model.named_modules()}
    for router in find_routers(model):
        has_moving_bias = (router.config.router_bias_update_speed if speed is None else speed) > 0
        is_moving = has_moving_bias or (router.share and router.share.target is not None)
        if is_moving and ".modules_to_save." not in names[router]:
            logger.warning(
                "ExpertBalanceCallback: balancing bias and expert share of the routers move, but are no part of the "
                "adapter; pass PEFT modules_to_save=['gate'], or keep them still (bias_update_speed=0, fixed experts)"
            )
            return


def _warn_of_fp16(args: Any, model: nn.Module) -> None:
    """Say so if the gradient scaler of fp16 will divide attached losses that it has not multiplied."""
    configs = [router.config for router in find_routers(model)]
    if args.fp16 and any(c.seq_aux_loss_coef or c.router_z_loss_coef or c.num_mtp_modules for c in configs):
        logger.warning(
            "fp16=True: its gradient scaler all but removes the auxiliary and prediction losses, which are attached "
            "inside the layers; use bf16=True"
        )
