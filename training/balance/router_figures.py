"""The figures of a MoE's routers in the log: load, idle experts, entropy, experts a token, bias.

`ExpertBalanceCallback` computes them from the counts of our routers, over all ranks; `TrainingFigures` from hooks on
those of any other model. Each figure is given as a mean or extreme over the MoE layers and for each layer, counted
from 0 at the first MoE layer. Surprising: the entropy is that of the softmax over all experts' logits, whatever the
router makes of them, so that it means the same in every model.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from modeling_deepseek.expert_load import ENTROPY_UNIT


@dataclasses.dataclass
class RouterWindow:
    """What one router did since the last log line.

    Attributes:
        tokens_per_expert: `[E]` int64.
        entropy: Sum over tokens, in nats.
        num_tokens: Tokens, padding left out.
        bias: `[E]` balancing bias; None where the router has none.
        tokens_per_count: By number of experts, how many tokens used that many; None where it is fixed.
        top_p: The share of an expert-share controller; None where there is none.
    """

    tokens_per_expert: torch.Tensor
    entropy: float
    num_tokens: int
    bias: torch.Tensor | None = None
    tokens_per_count: dict[int, int] | None = None
    top_p: float | None = None

    @classmethod
    def from_row(cls, row: torch.Tensor, router: nn.Module) -> "RouterWindow":
        """Return what the row of `ExpertLoad.as_row` says.

        Args:
            row: `[E + K + 3]` int64, on the CPU.
            router: One of ours.
        """
        num_experts, share = router.num_experts, router.share
        window = cls(row[:num_experts], int(row[-2]) * ENTROPY_UNIT, int(row[-1]), router.e_score_correction_bias)
        if share is not None:
            counts = row[num_experts:-2].tolist()
            window.tokens_per_count = {
                count: counts[count] for count in range(share.min_experts, share.max_experts + 1)
            }
            window.top_p = share.top_p
        return window

    @property
    def load_imbalance(self) -> float:
        """Max / mean of the load; 1 is even, the number of experts is collapse onto one."""
        load = self.tokens_per_expert.double()
        return float(load.max() / load.mean().clamp(min=1e-12))

    @property
    def figures(self) -> dict[str, float]:
        """This layer's figures."""
        num_tokens = max(self.num_tokens, 1)
        figures = {
            "load_imbalance": self.load_imbalance,
            "num_idle_experts": int((self.tokens_per_expert == 0).sum()),
            "router_entropy": self.entropy / num_tokens,
            "mean_experts_per_tok": int(self.tokens_per_expert.sum()) / num_tokens,
        }
        if self.bias is not None:
            figures["router_bias_range"] = float(self.bias.max() - self.bias.min())
        if self.top_p is not None:
            figures["expert_top_p"] = self.top_p
        return figures


def router_figures(windows: Sequence[RouterWindow]) -> dict[str, Any]:
    """Return the log's figures: over the layers, for each layer, and how many tokens used how many experts.

    Args:
        windows: One a MoE layer.
    """
    layers = [window.figures for window in windows]
    figures: dict[str, Any] = {"load_imbalance_max": max(layer["load_imbalance"] for layer in layers)}
    for name in layers[0]:
        values = [layer[name] for layer in layers if name in layer]
        figures[name] = _JOIN.get(name, _mean)(values)
    for name in layers[0]:
        figures.update({f"{name}_layer_{number}": layer[name] for number, layer in enumerate(layers) if name in layer})
    return {**figures, **_shares_by_count(windows)}


def _shares_by_count(windows: Sequence[RouterWindow]) -> dict[str, float]:
    """Share of tokens, over all layers, that used each number of experts: ``share_of_tokens_with_8_experts``."""
    counted = [window for window in windows if window.tokens_per_count is not None]
    num_tokens = max(sum(window.num_tokens for window in counted), 1)
    counts = sorted({count for window in counted for count in window.tokens_per_count})
    return {
        f"share_of_tokens_with_{count}_experts": sum(window.tokens_per_count.get(count, 0) for window in counted)
        / num_tokens
        for count in counts
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_JOIN = {"num_idle_experts": sum, "router_bias_range": max}
