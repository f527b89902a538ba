"""Expert balancing inside any transformers Trainer: one callback.

Pass `ExpertBalanceCallback()` to `Trainer`, to TRL's trainers, or call its hooks from a loop of your own. After each
optimizer step it adds up the routers' counts over all ranks, moves the balancing biases and expert shares, and keeps
figures for the log. Surprising: the auxiliary losses need no callback for their existence, only to know over how many
passes a step is accumulated; without one a model trains correctly, with less balancing, and says so once.
"""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(__name__)


class ExpertBalanceCallback(TrainerCallback):
    """Balances the experts of a `modeling_deepseek` model while it trains.

    Args:
        bias_update_speed: Replaces the model's `router_bias_update_speed` for this run (DeepSeek-V3: 0.001); None
            keeps it. A loaded checkpoint's is 0 unless asked for.

    Attributes:
        tokens_per_expert: `[L, E]` int64 on the CPU: the load of each MoE layer since the last log, over all ranks.
        history: One dict a log: the figures also added to the Trainer's log.
    """

    def __init__(self, bias_update_speed: float | None = None):
        if bias_update_speed is not None and bias_update_speed < 0:
            raise ValueError(f"bias_update_speed: {bias_update_speed} is not allowed, want at least 0")
        self.bias_update_speed = bias_update_speed
        self.tokens_per_expert: torch.Tensor | None = None
        self.history: list[dict[str, float]] = []
        self._window: torch.Tensor | None = None
        self._window_tokens = 0

    def on_train_begin(self, args, state, control, model=None, **kwargs: Any) -> None:
        """Tell the routers how many passes make a step.

        Args:
            args: Training arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: Unused.
        """
        routers = find_routers(model)
        if not routers:
            logger.warning("ExpertBalanceCallback: %s has no router of ours; nothing to balance", type(model).__name__)
        for router in routers:
            router.load.reset()
            router.load.num_accumulation_steps = args.gradient_accumulation_steps
            if self.bias_update_speed is not None:
                router.config.router_bias_update_speed = self.bias_update_speed
        self._window, self._window_tokens = None, 0

    def on_optimizer_step(self, args, state, control, model=None, **kwargs: Any) -> None:
        """Update biases and shares.

        Args:
            args: Training arguments.
            state: The trainer's state.
            control: The trainer's control.
            model: The model.
            **kwargs: Unused.
        """
        self.finish_step(model)

    def on_step_end(self, args, state, control, model=None, **kwargs: Any) -> None:
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

    def on_log(self, args, state, control, logs: dict | None = None, model=None, **kwargs: Any) -> None:
        """Add the window's figures to the log.

        Args:
            args: Training arguments.
            state: The trainer's state; its last log entry gets the figures too.
            control: The trainer's control.
            logs: What is being logged.
            model: The model.
            **kwargs: Unused.
        """
        if self._window is None or logs is None or "loss" not in logs:
            return
        figures = self._figures(find_routers(model))
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(figures)
        self.history.append({"step": state.global_step, **figures})
        self._window, self._window_tokens = None, 0

    def on_train_end(self, args, state, control, model=None, **kwargs: Any) -> None:
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
        counts = torch.stack([_counts(router) for router in routers])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        for router, row in zip(routers, counts, strict=True):
            router.finish_step(row[:-1], float(row[-1]))
        counts = counts.cpu()
        if self._window is None or self._window.shape != counts[:, :-1].shape:
            self._window, self._window_tokens = torch.zeros_like(counts[:, :-1]), 0
        self._window += counts[:, :-1]
        self._window_tokens += int(counts[0, -1])

    def _figures(self, routers: list[nn.Module]) -> dict[str, float]:
        """Load and routing figures of the window, one number each, mean or extreme over the layers."""
        load = self._window.double()
        self.tokens_per_expert = self._window.clone()
        imbalance = load.max(1).values / load.mean(1).clamp(min=1e-12)
        biases = torch.stack([router.e_score_correction_bias.float().cpu() for router in routers])
        figures = {
            "load_imbalance": imbalance.mean().item(),
            "load_imbalance_max": imbalance.max().item(),
            "num_idle_experts": float((load == 0).sum()),
            "mean_experts_per_tok": load.sum(1).mean().item() / max(self._window_tokens, 1),
            "router_bias_range": (biases.max() - biases.min()).item(),
        }
        shares = [router.share.top_p for router in routers if router.share is not None]
        if shares:
            figures["expert_top_p"] = sum(shares) / len(shares)
        return figures


def find_routers(model: nn.Module | None) -> list[nn.Module]:
    """Return a model's routers in order of layers.

    Found by what they can do, not by class: a checkpoint's own copy of the model's files makes another class.

    Args:
        model: Any module.
    """
    if model is None:
        return []
    return [module for module in model.modules() if hasattr(module, "finish_step") and hasattr(module, "load")]


def _counts(router: nn.Module) -> torch.Tensor:
    """`[E + 1]` int64: tokens per expert and tokens."""
    load, device = router.load, router.e_score_correction_bias.device
    if load.tokens_per_expert is None:
        return torch.zeros(router.num_experts + 1, dtype=torch.int64, device=device)
    return torch.cat([load.tokens_per_expert, load.num_tokens.view(1)]).to(device)
