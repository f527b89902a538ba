"""Elastic weight consolidation (EWC): each weight is held where it was as firmly as earlier text needs it.

    penalty = weight / 2 sum_i F_i (theta_i - theta0_i)^2,     F_i = mean over blocks of (d loss / d theta_i)^2

F is the empirical Fisher information's diagonal, on blocks of earlier text. Its gradient is added after clipping, so
that a large loss does not loosen the hold. Two more copies of the weights are kept.

Reference:
    Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3. F is over blocks of tokens here, not over single outcomes.
"""

from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ElasticWeights(TrainerCallback):
    """Pulls every weight back by how much earlier text needs it.

    Args:
        model: Before the training.
        blocks: Of earlier text, rows with ``input_ids`` `[S]`.
        weight: Of the penalty.
        num_blocks: At most so many of `blocks`, evenly spaced.
    """

    def __init__(self, model: PreTrainedModel, blocks: Dataset, *, weight: float, num_blocks: int) -> None:
        self.weight = weight
        trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
        self.anchors = {name: value.detach().clone() for name, value in trained}
        self.fisher = {name: torch.zeros_like(value) for name, value in trained}
        was_training, size = model.training, len(blocks)
        model.eval()
        number = min(size, num_blocks)
        for place in torch.linspace(0, size - 1, number, dtype=torch.float64).long().tolist():
            ids = blocks[place]["input_ids"][None].to(model.device)
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            for name, value in trained:
                if value.grad is not None:
                    self.fisher[name] += value.grad.square() / number
        model.zero_grad()
        model.train(was_training)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient."""
        for name, value in model.named_parameters():
            if name in self.fisher and value.grad is not None:
                value.grad += self.weight * self.fisher[name] * (value - self.anchors[name])
