"""The figures of a MoE's routers in the log: load, idle experts, entropy, experts per token, bias.

`ExpertBalanceCallback` and `TrainingFigures` make them of a `RoutingObserver`'s counts. Each figure is given as a mean
or extreme over the MoE layers and for each layer, counted from 0 at the first MoE layer. The entropy is that of the
softmax over all experts' logits in every model, also where the router makes sigmoid scores of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_training.balance.routing_observer import LayerCounts
from modeling_deepseek.families import MoeLayer


@dataclass(frozen=True)
class LoadRecord:
    """One line of the log about the routers.

    Attributes:
        step: Optimizer steps done.
        figures: As in the trainer's log, by name.
        tokens_per_expert: Each MoE layer's load since the line before, expert by expert.
    """

    step: int
    figures: Mapping[str, float]
    tokens_per_expert: list[list[int]]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "LoadRecord":
        """Return the record in a line of ``metrics.jsonl``, which must have `tokens_per_expert`."""
        figures = {name: value for name, value in row.items() if name not in ("step", "tokens_per_expert")}
        return cls(row["step"], figures, row["tokens_per_expert"])


@dataclass
class RouterWindow:
    """What one router did since the last line of the log.

    Attributes:
        tokens_per_expert: `[E]` int64.
        entropy: Sum over tokens, in nats.
        num_tokens: Tokens, padding left out.
        bias: `[E]` balancing bias; None where the router has none.
        tokens_per_count: By number of experts, how many tokens used that many; empty where it is fixed.
        top_p: The share of an expert-share controller; None where there is none.
    """

    tokens_per_expert: torch.Tensor
    entropy: float
    num_tokens: int
    bias: torch.Tensor | None
    tokens_per_count: dict[int, int]
    top_p: float | None

    @classmethod
    def of(cls, counts: LayerCounts, layer: MoeLayer) -> "RouterWindow":
        """Return the window of counts, with the router's bias and share as they are now."""
        share = getattr(layer.router, "share", None)
        per_count = {}
        if share is not None:
            numbers = counts.tokens_per_count.tolist()
            per_count = {count: numbers[count] for count in range(share.min_experts, share.max_experts + 1)}
        return cls(
            tokens_per_expert=counts.tokens_per_expert,
            entropy=counts.entropy,
            num_tokens=counts.num_tokens,
            bias=layer.bias,
            tokens_per_count=per_count,
            top_p=None if share is None else share.top_p,
        )

    @property
    def load_imbalance(self) -> float:
        """Max / mean of the load; 1 is even, the number of experts is collapse onto one."""
        load = self.tokens_per_expert.double()
        return float(load.max() / load.mean())

    @property
    def figures(self) -> dict[str, float]:
        """This layer's figures; none where no token was counted."""
        num_routed = int(self.tokens_per_expert.sum())
        if self.num_tokens == 0 or num_routed == 0:
            return {}
        figures = {
            "load_imbalance": self.load_imbalance,
            "num_idle_experts": int((self.tokens_per_expert == 0).sum()),
            "router_entropy": self.entropy / self.num_tokens,
            "mean_experts_per_tok": num_routed / self.num_tokens,
        }
        if self.bias is not None:
            figures["router_bias_range"] = float(self.bias.max() - self.bias.min())
        if self.top_p is not None:
            figures["expert_top_p"] = self.top_p
        return figures


def router_figures(windows: Sequence[RouterWindow]) -> dict[str, float]:
    """Return the log's figures: over the layers, for each layer, and how many tokens used how many experts.

    Args:
        windows: One per MoE layer. Of those without a counted token there are no figures.
    """
    layers = [window.figures for window in windows]
    names = list(dict.fromkeys(name for layer in layers for name in layer))
    if not names:
        return {}
    figures = {"load_imbalance_max": max(layer["load_imbalance"] for layer in layers if layer)}
    for name in names:
        values = [layer[name] for layer in layers if name in layer]
        figures[name] = _JOIN.get(name, _mean)(values)
    for name in names:
        figures.update({f"{name}_layer_{number}": layer[name] for number, layer in enumerate(layers) if name in layer})
    return {**figures, **_shares_by_count(windows)}


def _shares_by_count(windows: Sequence[RouterWindow]) -> dict[str, float]:
    """Share of tokens, over all layers, that used each number of experts: ``share_of_tokens_with_8_experts``."""
    counted = [window for window in windows if window.tokens_per_count and window.num_tokens]
    num_tokens = sum(window.num_tokens for window in counted)
    counts = sorted({count for window in counted for count in window.tokens_per_count})
    return {
        f"share_of_tokens_with_{count}_experts": sum(window.tokens_per_count.get(count, 0) for window in counted)
        / num_tokens
        for count in counts
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_JOIN = {"num_idle_experts": sum, "router_bias_range": max}
