"""Trains the indexer of sparse attention inside any transformers Trainer: one callback.

The indexers of DeepSeek-V3.2, V4, GLM-5 and their like only choose, so the model's loss has no gradient for them, and
transformers runs most under `torch.no_grad`. `IndexerTrainingCallback.attach(trainer)` gives them the loss of
DeepSeek-V3.2's report. It stands outside the models, so that it can go when transformers trains them itself.
"""

import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from deepseek_records.activation_checkpointing import uses_checkpointing
from deepseek_records.stages import is_number
from deepseek_training.balance.accumulation import StepPasses
from deepseek_training.balance.callback import TRAINING_KEYS, add_to_log
from deepseek_training.balance.class_only import ClassOnly
from deepseek_training.indexer.indexer_observer import IndexerObserver

logger = logging.get_logger(__name__)

# Settings of a training that the loss does not go with, each with the reason.
_NOT_WITH = {
    "fp16": "its gradient scaler divides what it has not multiplied; use bf16",
    "torch_compile": "the hooks run uncompiled code",
    "fsdp": "each process holds a part of the indexer only",
    "deepspeed": "it has not been tried",
}


class IndexerTrainingCallback(TrainerCallback):
    """Adds the indexer's loss to a training, first with the main model frozen and its attention dense.

    Per layer, over the non-padding queries t of a pass, with p the attention's weights summed over heads and
    normalized, and I the indexer's scores of detached inputs::

        loss = loss_coef * mean_t KL(p_t || softmax(I_t))

    In the first `warmup_steps` over all that a query sees, and nothing else is trained; then over the keys that the
    indexer chooses, beside the model's own loss, whose gradients stay as they are. The log gets `indexer_kl`, the
    mean over layers, and in the warm-up `indexer_recall`: the share of the dense attention that the keys the indexer
    would choose hold, of queries that see more than those.

    Args:
        warmup_steps: Optimizer steps with dense attention and a frozen main model (DeepSeek-V3.2: 1000). As many as
            the training has make a warm-up of its own, with a learning rate of its own (there 1e-3, then 7.3e-6).
        loss_coef: Weight of the loss.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from transformers import Trainer
        >>> def train(trainer: Trainer) -> None:
        ...     IndexerTrainingCallback.attach(trainer, warmup_steps=1000)
        ...     trainer.train()

    Reference:
        DeepSeek-AI 2025, "DeepSeek-V3.2", arXiv 2512.02556, section 2.1.1. We take the mean over tokens, not the sum.
    """

    def __init__(self, warmup_steps: int = 0, *, loss_coef: float = 1.0) -> None:
        if isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 0:
            raise ValueError(f"warmup_steps: got {warmup_steps!r}, expected a whole number of at least 0")
        if not is_number(loss_coef) or not 0 < loss_coef < math.inf:
            raise ValueError(f"loss_coef: got {loss_coef!r}, expected a number above 0; 0 trains no indexer")
        self.warmup_steps = warmup_steps
        self.loss_coef = loss_coef
        self._trainer: Trainer | None = None
        self._observer: IndexerObserver | None = None
        self._passes = StepPasses(None)
        self._frozen: list[nn.Parameter] = []

    @ClassOnly
    def attach(cls, trainer: Trainer, warmup_steps: int = 0, *, loss_coef: float = 1.0) -> "IndexerTrainingCallback":
        """Make a callback, put it before the trackers of a trainer, and return it.

        Args:
            trainer: Any trainer, before `train`.
            warmup_steps: As for the class, like what follows.
            loss_coef: Likewise.
        """
        callback = cls(warmup_steps, loss_coef=loss_coef)
        callback._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, callback)
        return callback

    # For a loop of one's own ----------------------------------------------------------------------------------------

    def begin(self, model: nn.Module) -> None:
        """Begin to train the indexers; a loop of one's own calls this before its first pass.

        Args:
            model: The model, wrapped or not.

        Raises:
            ValueError: It has no indexer, or one that cannot be trained.
        """
        self._observer = IndexerObserver(model, self.loss_coef).attach()

    def begin_step(self, model: nn.Module, step: int, num_passes: int = 1) -> None:
        """Set the stage and the weight of the loss; to be called before each optimizer step.

        Args:
            model: The one given to `begin`.
            step: Optimizer steps taken before this one.
            num_passes: Forward passes that make this step.
        """
        observer = self._observing
        observer.num_passes = num_passes
        is_dense = step < self.warmup_steps
        if is_dense != observer.is_dense:
            observer.is_dense = is_dense
            if is_dense:
                self._freeze(model)
            else:
                self._thaw()

    def end(self) -> None:
        """Remove the hooks, and let the main model be trained again."""
        if self._observer is not None:
            self._observer.detach()
        self._observer = None
        self._thaw()

    # Trainer's events -----------------------------------------------------------------------------------------------

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Begin, and refuse what the loss does not go with."""
        _refuse_settings(args)
        if self._trainer is not None and (self._trainer.is_fsdp_enabled or self._trainer.is_deepspeed_enabled):
            raise ValueError("accelerate: got FSDP or DeepSpeed with an indexer's loss, expected DDP or one process")
        if self.warmup_steps:
            _refuse_unused_parameters(args, model)
        self._passes = StepPasses(self._trainer)
        self.begin(model)

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
        """Tell which stage the step is in and how many passes make it."""
        self.begin_step(model, state.global_step, self._passes.next_step(args))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures since the last line to a line on training."""
        if self._observer is None or logs is None or TRAINING_KEYS.isdisjoint(logs):
            return
        figures = _mean_over_ranks(self._observer.figures, self._observer.device)
        self._observer.figures = {}
        add_to_log(figures, logs, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop."""
        self.end()

    @property
    def _observing(self) -> IndexerObserver:
        assert self._observer is not None, "begin comes first"
        return self._observer

    def _freeze(self, model: nn.Module) -> None:
        trained = {parameter for layer in self._observing.layers for parameter in layer.parameters}
        self._frozen = [p for p in model.parameters() if p.requires_grad and p not in trained]
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def _thaw(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen = []


def _mean_over_ranks(sums: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """The means that the log shows; a collective operation where there are several ranks."""
    names = ("kl", "kl_count", "recall", "recall_count")
    row = torch.stack([sums.get(name, torch.zeros(())).to(device) for name in names])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(row)
    divergence, num_divergences, recall, num_recalls = row.tolist()
    figures = {"indexer_kl": divergence / num_divergences} if num_divergences else {}
    return {**figures, "indexer_recall": recall / num_recalls} if num_recalls else figures


def _refuse_settings(args: TrainingArguments) -> None:
    for name, reason in _NOT_WITH.items():
        if getattr(args, name):
            raise ValueError(f"{name}: got {getattr(args, name)!r} with an indexer's loss, expected none; {reason}")
    if args.n_gpu > 1:
        raise ValueError(f"n_gpu: got {args.n_gpu} in one process with an indexer's loss, expected 1; use torchrun")


def _refuse_unused_parameters(args: TrainingArguments, model: nn.Module) -> None:
    """A frozen model under DDP has gradients that never come, which DDP must be told."""
    finds = args.ddp_find_unused_parameters
    if args.world_size > 1 and not (not uses_checkpointing(model) if finds is None else finds):
        raise ValueError(
            f"ddp_find_unused_parameters: got {finds} with warmup_steps over {args.world_size} processes, expected "
            "True; the main model is frozen in the warm-up"
        )
