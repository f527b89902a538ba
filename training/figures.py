"""What one sees of a MoE while it trains: load of the experts, router entropy, experts a token, speed, memory, MFU.

`TrainingFigures` works with any `transformers.Trainer` and any model whose routers transformers can record (ours,
DeepSeek-V3, Mixtral, Qwen and others). It adds its figures to the trainer's own log, so whatever `report_to` names
gets them. Surprising: it must be the trainer's first callback, which `TrainingFigures.attach` sees to, because
trackers read the log in the order of the callbacks.
"""

import math
import resource
import time
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from deepseek_training.balance import ExpertBalanceCallback
from modeling_deepseek import DeepseekConfig
from modeling_deepseek.parameter_count import count_parameters


class TrainingFigures(TrainerCallback):
    """Collects figures over the steps since the last log line and adds them to it.

    Attributes:
        tokens_per_expert: Routed tokens of each expert in the last logged window, one list a MoE layer.
    """

    def __init__(self):
        self.tokens_per_expert: list[list[int]] = []
        self._routers: list[_RouterWindow] = []
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
        trainer.callback_handler.callbacks[:0] = [figures] if balance is None else [figures, balance]
        return figures

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Hook the routers and the model's input."""
        self._routers = [_RouterWindow(module) for module in find_routers(model)]
        self._handles = [router.hook() for router in self._routers]
        self._handles.append(model.register_forward_pre_hook(self._count_tokens, with_kwargs=True))
        self._config = model.config
        if self._config.model_type == DeepseekConfig.model_type:  # other models' products are not counted
            self._peak_flops = measure_matmul_peak(args.device, torch.bfloat16 if args.bf16 else torch.float32)

    def on_train_end(self, args, state, control, **kwargs):
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _count_tokens(self, module, args, kwargs):
        tokens = kwargs.get("input_ids")
        if module.training and torch.is_grad_enabled() and tokens is not None:
            self._num_tokens += tokens.numel()
            self._context_length = tokens.shape[-1]

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock of a step; evaluation and saving lie outside it."""
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock."""
        self._seconds += time.perf_counter() - self._began

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Add the window's figures to a training line and begin a new window."""
        if logs is None or "loss" not in logs or not self._seconds:
            return
        speed = self._num_tokens / self._seconds
        logs["tokens_per_second"] = round(speed, 1)
        logs["peak_memory_gib"] = round(peak_memory_gib(), 3)
        self._num_tokens, self._seconds = 0, 0.0
        windows = [router for router in self._routers if router.num_tokens]
        if windows:
            self.tokens_per_expert = [router.tokens_per_expert.tolist() for router in windows]
            logs.update(_summarise(windows))
        if self._peak_flops:
            counted = count_parameters(self._config, logs.get("mean_experts_per_tok"))
            logs["mfu"] = 3 * counted.flops_per_token(self._context_length) * speed / self._peak_flops
        for router in windows:
            router.reset()


class _RouterWindow:
    """Counts of one router since the last log line."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.reset()

    def reset(self) -> None:
        self.tokens_per_expert, self.entropy, self.num_tokens = None, 0.0, 0

    def hook(self):
        return self.module.register_forward_hook(self._record)

    @torch.no_grad()
    def _record(self, module, args, output):
        if not module.training:
            return
        router_logits, topk_weights, topk_indices = output
        num_experts = router_logits.shape[-1]
        if self.tokens_per_expert is None:
            self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=router_logits.device)
        # An unused slot has weight 0 or the index E. No bincount or boolean index: they wait for the GPU.
        is_used = (topk_weights != 0) & (topk_indices < num_experts)
        indices = topk_indices.clamp(max=num_experts - 1)
        self.tokens_per_expert.scatter_add_(0, indices.flatten(), is_used.flatten().long())
        shares = router_logits.float().softmax(-1).flatten(0, -2)
        self.entropy = self.entropy + torch.special.entr(shares).sum()
        self.num_tokens += len(shares)


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose output `transformers` records as router logits and which choose experts.

    Args:
        model: A model, possibly wrapped for distributed training.
    """
    classes = set()
    for module in model.modules():
        recorder = getattr(module, "_can_record_outputs", None) or {}
        target = recorder.get("router_logits")
        classes.add(getattr(target, "target_class", target))
    classes.discard(None)
    return [module for module in model.modules() if isinstance(module, tuple(classes))]


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


def load_imbalance(tokens_per_expert: torch.Tensor) -> float:
    """Return max / mean of the load; 1 is even, the number of experts is collapse.

    Args:
        tokens_per_expert: `[E]`.
    """
    load = tokens_per_expert.double()
    return float(load.max() / load.mean())


def _summarise(windows: list[_RouterWindow]) -> dict[str, Any]:
    """Scalars for the log: means over layers, and each layer's imbalance."""
    imbalances = [load_imbalance(router.tokens_per_expert) for router in windows]
    figures = {
        "load_imbalance": sum(imbalances) / len(imbalances),
        "router_entropy": sum(float(router.entropy) / router.num_tokens for router in windows) / len(windows),
        "mean_experts_per_tok": sum(int(router.tokens_per_expert.sum()) / router.num_tokens for router in windows)
        / len(windows),
        "num_idle_experts": sum(int((router.tokens_per_expert == 0).sum()) for router in windows),
    }
    for layer, value in enumerate(imbalances):
        figures[f"load_imbalance_layer_{layer}"] = value
    biases = [bias for router in windows if (bias := _bias(router.module)) is not None]
    if biases:
        figures["router_bias_range"] = max(float(bias.max() - bias.min()) for bias in biases)
    return figures


def _bias(router: nn.Module) -> torch.Tensor | None:
    return dict(router.named_buffers()).get("e_score_correction_bias")
