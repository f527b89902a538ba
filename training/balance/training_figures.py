"""What one sees of a model while it trains: speed, memory, share of the matmul peak, and its routers' figures.

`TrainingFigures` works with any `transformers.Trainer` and any model; that of its routers needs some that transformers
can record and that return which experts they choose (`recorded_routers.py`). It adds its figures to the trainer's own
log, so whatever `report_to` names gets them. Surprising: beside an `ExpertBalanceCallback` it leaves the routers to
that one, whose counts are exact: over all ranks, without padding, and a layer that is recomputed counted once.
"""

import math
import resource
import time
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from deepseek_training.balance.callback import TRAINING_KEYS, ExpertBalanceCallback
from deepseek_training.balance.callback import find_routers as find_balanced
from deepseek_training.balance.callback_order import move_before_trackers
from deepseek_training.balance.recorded_routers import entropy_sum, find_routers, read_choice
from deepseek_training.balance.router_figures import RouterWindow, router_figures
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters

logger = logging.get_logger(__name__)


class TrainingFigures(TrainerCallback):
    """Collects figures over the steps since the last log line and adds them to it.

    Attributes:
        tokens_per_expert: Routed tokens of each expert in the last logged window, one list a MoE layer.
    """

    reads_before_trackers = True

    def __init__(self) -> None:
        self.tokens_per_expert: list[list[int]] = []
        self._balance: ExpertBalanceCallback | None = None
        self._routers: list[_HookedRouter] = []
        self._handles = []
        self._num_tokens, self._seconds, self._began = 0, 0.0, 0.0
        self._config, self._context_length, self._peak_flops = None, 0, 0.0

    @classmethod
    def attach(cls, trainer: Trainer, *, balance: ExpertBalanceCallback | None = None) -> "TrainingFigures":
        """Add figures to a trainer, before its trackers.

        Args:
            trainer: Any trainer, before `train`.
            balance: A balancing callback, which adds its own figures to the log and so belongs before them too.
        """
        figures = cls()
        trainer.callback_handler.callbacks[:0] = [figures] if balance is None else [balance, figures]
        return figures

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Hook the model's input, and its routers unless a balancing callback counts them."""
        others = move_before_trackers(self)
        self._balance = next((other for other in others if isinstance(other, ExpertBalanceCallback)), None)
        is_counted = self._balance is not None and bool(find_balanced(model))
        self._routers = [] if is_counted else [_HookedRouter(*found) for found in find_routers(model)]
        self._handles = [router.hook() for router in self._routers]
        self._handles.append(model.register_forward_pre_hook(self._count_tokens, with_kwargs=True))
        self._config = model.config
        if self._config.model_type == DeepseekConfig.model_type:  # other models' products are not counted
            self._peak_flops = measure_matmul_peak(args.device, torch.bfloat16 if args.bf16 else torch.float32)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

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
        figures = {"tokens_per_second": round(speed, 1), "peak_memory_gib": round(peak_memory_gib(), 3)}
        self._num_tokens, self._seconds = 0, 0.0
        windows = [router.take() for router in self._routers if router.num_tokens]
        if windows:
            self.tokens_per_expert = [window.tokens_per_expert.tolist() for window in windows]
            figures.update(router_figures(windows))
        elif self._balance is not None and self._balance.tokens_per_expert is not None:
            self.tokens_per_expert = self._balance.tokens_per_expert.tolist()
        if self._peak_flops:
            counted = count_parameters(self._config, {**logs, **figures}.get("mean_experts_per_tok"))
            figures["mfu"] = 3 * counted.flops_per_token(self._context_length) * speed / self._peak_flops
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)


class _HookedRouter:
    """Counts of one router since the last log line, by a hook."""

    def __init__(self, module: nn.Module, place: int) -> None:
        self.module, self.place = module, place
        self._reset()

    def _reset(self) -> None:
        self.tokens_per_expert, self.entropy, self.num_tokens = 0, 0.0, 0

    def take(self) -> RouterWindow:
        """Return the window and begin another."""
        bias = dict(self.module.named_buffers()).get("e_score_correction_bias")
        window = RouterWindow(self.tokens_per_expert.cpu(), float(self.entropy), self.num_tokens, bias)
        self._reset()
        return window

    def hook(self) -> Any:
        return self.module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            self._count(type(module).__name__, output)

    @torch.no_grad()
    def _count(self, name: str, output: object) -> None:
        choice = read_choice(output, self.place)
        if choice is None:
            logger.warning_once(
                f"TrainingFigures: {name} does not return which experts it chooses; the log has no figures of them"
            )
            return
        router_logits, load = choice
        self.tokens_per_expert = self.tokens_per_expert + load
        self.entropy = self.entropy + entropy_sum(router_logits)
        self.num_tokens += len(router_logits)


def peak_memory_gib() -> float:
    """Return the most memory used so far: allocated on the GPU, or resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a large matrix product, what `mfu` is a share of.

    Measured rather than looked up: no table knows every CPU, and a shared machine gives less than its sheet says.

    Args:
        device: Where the model trains.
        dtype: What it multiplies in.
    """
    size = 8192 if device.type == "cuda" else 1024
    left = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best
