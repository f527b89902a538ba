"""Speed, memory, share of the matmul peak and router figures of a training, in the trainer's own log.

`TrainingFigures` works with any `transformers.Trainer` and any model. Beside an `ExpertBalanceCallback`, pass that one
to it: the router figures are then left to the callback, whose counts are over all ranks.
"""

import resource
import time
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from deepseek_records.matmul_rate import measure_matmul_rate
from deepseek_training.balance.callback import (
    TRAINING_KEYS,
    ExpertBalanceCallback,
    add_to_log,
    warn_of_silent_router,
)
from deepseek_training.balance.class_only import ClassOnly
from deepseek_training.balance.router_figures import RouterWindow, router_figures
from deepseek_training.balance.routing_observer import RoutingObserver
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters

logger = logging.get_logger(__name__)


class TrainingFigures(TrainerCallback):
    """Collects figures over the steps since the last log line and adds them to it.

    Args:
        balance: The balancing callback of the same trainer, which counts the routers over all ranks. Without one, they
            are counted here, in one process.

    Attributes:
        tokens_per_expert: Routed tokens of each expert in the last logged window, one list per MoE layer.
    """

    def __init__(self, balance: ExpertBalanceCallback | None = None) -> None:
        self.tokens_per_expert: list[list[int]] = []
        self._balance = balance
        self._observer: RoutingObserver | None = None
        self._handle = None
        self._is_attached = False
        self._num_tokens, self._seconds, self._began = 0, 0.0, 0.0
        self._config, self._context_length, self._peak_flops = None, 0, 0.0

    @ClassOnly
    def attach(cls, trainer: Trainer, *, balance: ExpertBalanceCallback | None = None) -> "TrainingFigures":
        """Add figures to a trainer, before its trackers, and return them.

        Args:
            trainer: Any trainer, before `train`.
            balance: A balancing callback, which adds its own figures to the log and so is put before them too.
        """
        figures = cls(balance)
        figures._is_attached = True
        trainer.callback_handler.callbacks.insert(0, figures)
        if balance is not None:
            balance.move_before_trackers(trainer)
        return figures

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        """Hook the model's input, and its routers unless a balancing callback counts them."""
        if args.report_to and not self._is_attached:
            logger.warning_once(
                f"TrainingFigures: the trackers {', '.join(args.report_to)} come before it and do not get its "
                "figures; TrainingFigures.attach(trainer) puts it first"
            )
        if self._balance is None:
            self._observer = RoutingObserver(model, report=warn_of_silent_router).attach()
            if args.torch_compile:
                torch.compiler.reset()  # a graph from an earlier training would not know of the hooks
        self._handle = model.register_forward_pre_hook(self._count_tokens, with_kwargs=True)
        self._config = model.config
        if self._config.model_type == DeepseekConfig.model_type:  # other models' products are not counted
            self._peak_flops = measure_matmul_rate(args.device, torch.bfloat16 if args.bf16 else torch.float32)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        self._handle.remove()
        if self._observer is not None:
            self._observer.detach()

    def _count_tokens(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids")
        if module.training and torch.is_grad_enabled() and tokens is not None:
            self._num_tokens += tokens.numel()
            self._context_length = tokens.shape[-1]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock of a step; evaluation and saving lie outside it."""
        self._began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._began

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the window's figures to a training line and begin a new window."""
        if logs is None or TRAINING_KEYS.isdisjoint(logs) or not self._seconds:
            return
        speed = self._num_tokens / self._seconds
        figures = {"peak_memory_gib": round(peak_memory_gib(), 3)}
        if speed:  # 0 where the model is given embeddings instead of tokens
            figures["tokens_per_second"] = round(speed, 1)
        self._num_tokens, self._seconds = 0, 0.0
        figures.update(self._take_router_figures())
        if self._peak_flops and speed:
            counted = count_parameters(self._config, {**logs, **figures}.get("mean_experts_per_tok"))
            figures["mfu"] = 3 * counted.flops_per_token(self._context_length) * speed / self._peak_flops
        add_to_log(figures, logs, state)

    def _take_router_figures(self) -> dict[str, float]:
        if self._balance is not None:
            self.tokens_per_expert = [load.tolist() for load in self._balance.tokens_per_expert]
            return {}
        counts = self._observer.take(over_ranks=False)
        layers = self._observer.counted_layers
        windows = [RouterWindow.of(counted, layer) for counted, layer in zip(counts, layers, strict=True)]
        figures = router_figures(windows)
        if figures:
            self.tokens_per_expert = [window.tokens_per_expert.tolist() for window in windows]
        return figures

    def take_logged_load(self, tokens_per_expert: list[list[int]]) -> None:
        """Take the last logged window of the run that a resumed training goes on from; it may log none of its own.

        Args:
            tokens_per_expert: As the attribute.
        """
        self.tokens_per_expert = tokens_per_expert


def peak_memory_gib() -> float:
    """Return the most memory used so far: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
