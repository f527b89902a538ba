"""Expert balancing inside any transformers Trainer, of any MoE: one callback.

`ExpertBalanceCallback.attach(trainer)` puts it before the trainer's trackers. In `callbacks=[ExpertBalanceCallback()]`
it works alike, but trackers, which come first there, do not get its figures. After each optimizer step it adds up the
routers' counts over all ranks, moves the balancing biases and expert shares, and keeps figures for the log.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from deepseek_records.stages import is_number
from deepseek_training.balance.accumulation import StepPasses, length_of
from deepseek_training.balance.bias_speed import check_bias_speed
from deepseek_training.balance.class_only import ClassOnly
from deepseek_training.balance.router_figures import LoadRecord, RouterWindow, router_figures
from deepseek_training.balance.routing_observer import LayerCounts, RouterLosses, RoutingObserver, has_own_losses
from modeling_deepseek.families import MoeLayer
from modeling_deepseek.routing import move_bias
from modeling_deepseek.training_pass import set_accumulation_steps

logger = logging.get_logger(__name__)

# What a line of the log on training has, of one on evaluation or on the whole run has not; the second is TRL's PPO's.
TRAINING_KEYS = frozenset({"loss", "loss/policy_avg"})
# Max / mean of the load above which the last line of a training is a warning: DeepSeek-V3's stays below 2.
IMBALANCE_BOUND = 4.0


class ExpertBalanceCallback(TrainerCallback):
    """Balances the experts of any MoE of transformers while it trains, and logs their load.

    A model of `modeling_deepseek` has its own settings for all of this; of other models the arguments are all there
    is.

    Args:
        bias_update_speed: Step of the balancing bias per optimizer step (DeepSeek-V3: 0.001). None takes our models'
            `router_bias_update_speed`, which a loaded checkpoint has at 0, and leaves other models' bias alone. The
            model's own setting stays as it is, also in what is saved.
        seq_aux_loss_coef: Weight of the sequence-wise balance loss, attached to the routers of models that are not
            ours (DeepSeek-V3: 1e-4).
        router_z_loss_coef: Weight of the router's z-loss, likewise (ST-MoE: 1e-3).

    Attributes:
        tokens_per_expert: `[E]` int64 on the CPU per MoE layer: the load since the last log, over all ranks; empty
            until something is logged.
        history: One record per line of the log.

    Raises:
        ValueError: An argument is below 0 or no number.
    """

    def __init__(
        self,
        bias_update_speed: float | None = None,
        *,
        seq_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
    ) -> None:
        named = {
            "bias_update_speed": bias_update_speed or 0.0,
            "seq_aux_loss_coef": seq_aux_loss_coef,
            "router_z_loss_coef": router_z_loss_coef,
        }
        for name, value in named.items():
            if not is_number(value) or not 0 <= value < math.inf:
                raise ValueError(f"{name}: got {value!r}, expected a number of at least 0")
        self.bias_update_speed = bias_update_speed
        self.losses = RouterLosses(seq_aux_loss_coef, router_z_loss_coef)
        self.tokens_per_expert: list[torch.Tensor] = []
        self.history: list[LoadRecord] = []
        self._trainer: Trainer | None = None
        self._observer: RoutingObserver | None = None
        self._passes = StepPasses(None)
        self._window: list[LayerCounts] = []

    @ClassOnly
    def attach(
        cls,
        trainer: Trainer,
        bias_update_speed: float | None = None,
        *,
        seq_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
    ) -> "ExpertBalanceCallback":
        """Make a callback, put it before the trackers of a trainer, and return it.

        Args:
            trainer: Any trainer, before `train`.
            bias_update_speed: As for the class, like what follows.
            seq_aux_loss_coef: Likewise.
            router_z_loss_coef: Likewise.
        """
        callback = cls(bias_update_speed, seq_aux_loss_coef=seq_aux_loss_coef, router_z_loss_coef=router_z_loss_coef)
        callback.move_before_trackers(trainer)
        return callback

    def move_before_trackers(self, trainer: Trainer) -> None:
        """Put this callback first among a trainer's, where trackers get its figures, and ask it for passes."""
        self._trainer = trainer
        others = [other for other in trainer.callback_handler.callbacks if other is not self]
        trainer.callback_handler.callbacks[:] = [self, *others]

    @property
    def is_counting(self) -> bool:
        """True while a training with routers runs."""
        return self._observer is not None and bool(self._observer.layers)

    # For a loop of one's own ----------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, num_passes: int = 1) -> None:
        """Begin to count; a loop of one's own calls this before its first pass.

        Args:
            model: The model, wrapped or not.
            num_passes: Forward passes per optimizer step.

        Raises:
            ValueError: The model has nothing that a setting could act on.
        """
        self._observer = RoutingObserver(model, losses=self.losses, report=warn_of_silent_router)
        self._refuse_idle_settings(model)
        self._observer.attach()
        self._window = []
        self._set_passes(model, num_passes)
        if self.bias_update_speed:
            for layer in self._observer.layers:
                _keep_bias_in_float32(layer)

    @torch.no_grad()
    def finish_step(self) -> None:
        """Sum the counts over all ranks and move biases and shares; to be called after each optimizer step."""
        if self._observer is None:
            return
        counts = self._observer.take(over_ranks=True)
        for layer, counted in zip(self._observer.counted_layers, counts, strict=True):
            if has_own_losses(layer.router):
                layer.router.finish_step(counted.tokens_per_expert, counted.num_tokens, self.bias_update_speed)
            elif self.bias_update_speed and layer.bias is not None and counted.num_tokens:
                move_bias(
                    layer.bias[: len(counted.tokens_per_expert)], counted.tokens_per_expert, self.bias_update_speed
                )
        if len(self._window) != len(counts):  # a router of an older family is first seen when it first runs
            self._window = counts
        else:
            self._window = [before + now for before, now in zip(self._window, counts, strict=True)]

    def end(self, model: nn.Module) -> None:
        """Stop counting and take back what `begin` told the model.

        Args:
            model: The one given to `begin`.
        """
        if self._observer is not None:
            self._observer.detach()
        self._observer = None
        set_accumulation_steps(model, None)

    # Trainer's events -----------------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: object = None,
        **kwargs: Any,
    ) -> None:
        """Begin to count, and say what the arguments and the model do not allow."""
        self._passes = StepPasses(self._trainer)
        self.begin(model, args.gradient_accumulation_steps)
        if args.torch_compile:
            torch.compiler.reset()  # a graph from an earlier training would not know of the hooks
        if self._trainer is None:
            self._warn_of_place(args, train_dataloader)
        _warn_of_lost_state(model, self._observing.layers, self.bias_update_speed)
        _warn_of_fp16(args, self._observing.layers, self.losses)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        train_dataloader: object = None,
        **kwargs: Any,
    ) -> None:
        """Note how many passes the epoch has."""
        self._passes.begin_epoch(args, state, train_dataloader)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Tell how many passes make this step."""
        self._set_passes(model, self._passes.next_step(args))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update biases and shares."""
        self.finish_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do likewise for trainers that do not announce optimizer steps (TRL's PPO)."""
        if self._observer is not None and self._observer.has_passes:
            self.finish_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the window's figures to a line on training."""
        if not self._window or logs is None or TRAINING_KEYS.isdisjoint(logs) or self._observer is None:
            return
        layers = self._observer.counted_layers
        windows = [RouterWindow.of(counts, layer) for counts, layer in zip(self._window, layers, strict=True)]
        self._window = []
        figures = router_figures(windows)
        if not figures:
            return
        add_to_log(figures, logs, state)
        self.tokens_per_expert = [window.tokens_per_expert for window in windows]
        self.history.append(LoadRecord(state.global_step, figures, [load.tolist() for load in self.tokens_per_expert]))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Stop counting; warn of experts that stayed unbalanced."""
        self.end(model)
        if self.history and self.history[-1].figures["load_imbalance_max"] > IMBALANCE_BOUND:
            _warn_of_imbalance(self.history[-1])

    def _set_passes(self, model: nn.Module, num_passes: int) -> None:
        set_accumulation_steps(model, num_passes)
        self._observing.num_passes = num_passes

    @property
    def _observing(self) -> RoutingObserver:
        assert self._observer is not None, "begin comes first"
        return self._observer

    def _refuse_idle_settings(self, model: nn.Module) -> None:
        layers = self._observing.layers
        if not layers and not self.bias_update_speed and not self.losses:
            logger.warning("ExpertBalanceCallback: %s has no router; nothing to balance", type(model).__name__)
        check_bias_speed(model, self.bias_update_speed)
        if self.losses and not layers:
            raise ValueError(
                f"seq_aux_loss_coef, router_z_loss_coef: got {self.losses.seq_aux_loss_coef}, "
                f"{self.losses.router_z_loss_coef} for {type(model).__name__}, expected 0; it has no router"
            )

    def _warn_of_place(self, args: TrainingArguments, train_dataloader: object) -> None:
        if args.report_to and self._observing.layers:
            logger.warning_once(
                f"ExpertBalanceCallback: the trackers {', '.join(args.report_to)} come before it and do not get its "
                "figures; ExpertBalanceCallback.attach(trainer) puts it first"
            )
        if args.gradient_accumulation_steps > 1 and length_of(train_dataloader) is None:
            logger.warning_once(
                "ExpertBalanceCallback: the data have no length, so a shorter last step of an epoch counts as "
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} passes; "
                "ExpertBalanceCallback.attach(trainer) asks the trainer"
            )


def add_to_log(figures: dict[str, float], logs: dict[str, float], state: TrainerState) -> None:
    """Add figures to a line that is being logged, and to the trainer's own copy of it.

    Figures that stand there already stay: those of `ExpertBalanceCallback` are over all ranks.
    """
    lines = [logs]
    if state.log_history and state.log_history[-1].get("step") == state.global_step:
        lines.append(state.log_history[-1])
    for line in lines:
        line.update({name: value for name, value in figures.items() if name not in line})


def _keep_bias_in_float32(layer: MoeLayer) -> None:
    """Widen a bias of fewer bits: in bf16 it stops moving (0.5 + 0.001 = 0.5)."""
    if layer.bias_owner is None:
        return
    owner, name = layer.bias_owner
    bias = getattr(owner, name)
    if bias.dtype == torch.float32:
        return
    logger.warning_once(f"{name} is in {bias.dtype}, where steps of 0.001 are lost; from now on it is in float32")
    bias.data = bias.data.float()


def warn_of_silent_router(name: str) -> None:
    """Say once that a router's class does not return its choice."""
    logger.warning_once(f"{name} does not return which experts it chooses; the log has no figures of it")


def _warn_of_imbalance(record: LoadRecord) -> None:
    logger.warning(
        f"load_imbalance_max: got {record.figures['load_imbalance_max']:.1f} at step {record.step}, expected at most "
        f"{IMBALANCE_BOUND:g}, with {record.figures['num_idle_experts']:g} idle experts; set bias_update_speed or "
        "seq_aux_loss_coef"
    )


def _warn_of_lost_state(model: nn.Module, layers: Sequence[MoeLayer], speed: float | None) -> None:
    """Say so if what moves in the routers is not part of the adapter that PEFT saves."""
    if not hasattr(model, "peft_config"):
        return
    names = {module: name for name, module in model.named_modules()}
    for layer in layers:
        owner = layer.router if layer.bias_owner is None else layer.bias_owner[0]
        if _is_moving(layer, speed) and ".modules_to_save." not in names[owner]:
            logger.warning(
                "ExpertBalanceCallback: balancing bias and expert share of the routers move, but are not part of the "
                f"adapter; pass PEFT modules_to_save=[{layer.router_name!r}], or keep them still "
                "(bias_update_speed=0, fixed experts)"
            )
            return


def _is_moving(layer: MoeLayer, speed: float | None) -> bool:
    if not has_own_losses(layer.router):
        return bool(speed) and layer.bias is not None
    speed = layer.router.config.router_bias_update_speed if speed is None else speed
    return speed > 0 or bool(layer.router.share and layer.router.share.target is not None)


def _warn_of_fp16(args: TrainingArguments, layers: Sequence[MoeLayer], losses: RouterLosses) -> None:
    """Say so if the gradient scaler of fp16 will divide attached losses that it has not multiplied."""
    configs = [layer.router.config for layer in layers if has_own_losses(layer.router)]
    attaches = bool(losses) or any(
        config.seq_aux_loss_coef or config.router_z_loss_coef or config.num_mtp_modules for config in configs
    )
    if args.fp16 and attaches:
        logger.warning(
            "fp16=True: its gradient scaler all but removes the auxiliary and prediction losses, which are attached "
            "inside the layers; use bf16=True"
        )
