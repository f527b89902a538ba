"""A router's choice of experts replaced by the noted one, while the router runs.

`RouterReplay` puts it around a router. Axes: T tokens, E experts, K slots per token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from modeling_deepseek.families import MoeLayer
from modeling_deepseek.router_output import read_choice


@dataclass
class FoundTokens:
    """Where the tokens of a pass stand in the records.

    Attributes:
        shape: (B, S) of the pass.
        rows: [T] int64; anything where `is_found` is False.
        is_found: [T] bool.
        live_rows: Where it is False, on a CPU; None on a GPU, where to know it would wait for the device.
        is_recomputed: Whether activation checkpointing will run the layers again, in the backward pass.
    """

    shape: torch.Size
    rows: torch.Tensor
    is_found: torch.Tensor
    live_rows: torch.Tensor | None
    is_recomputed: bool


class ReplayedChoice(TorchFunctionMode):
    """While a router runs, its `topk` over the experts returns the noted ones, with the values that stand there now.

    A `topk` over groups of experts returns groups in which the noted ones lie.
    """

    def __init__(self, layer: MoeLayer, found: FoundTokens, table: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.table = table.long()
        self.found = found
        self.is_found = found.is_found.unsqueeze(1)
        self.num_calls = 0
        self.num_experts = layer.num_experts
        self.is_used = torch.ones_like(self.table, dtype=torch.bool)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") != "topk" or args[0].ndim < 2:
            return func(*args, **kwargs)
        scores, shape = args[0].flatten(0, -2), args[0].shape[:-1]
        if len(shape) == 2 and shape != self.found.shape:
            return func(*args, **kwargs)  # within groups of experts
        if len(scores) != len(self.table):
            raise ValueError(
                f"router_replay: got {len(scores)} tokens in {type(self.layer.router).__name__}, expected "
                f"{len(self.table)} as in the model's input"
            )
        num_chosen, width = kwargs.get("k", args[1] if len(args) > 1 else 0), scores.shape[1]
        if num_chosen == self.table.shape[1] and width >= (self.num_experts or num_chosen):
            self.num_calls += 1
            indices = self._with_live(scores, lambda part: func(part, *args[1:], **kwargs)[1])
            values = scores.gather(1, indices)
            return torch.return_types.topk((values.unflatten(0, shape), indices.unflatten(0, shape)))
        if self.num_experts and self.num_experts % width == 0:
            groups = self._noted(self.num_experts) // (self.num_experts // width)
            uses = torch.zeros_like(scores, dtype=torch.long).scatter_add_(1, groups, self.is_used.long())
            needed = ((uses > 0) & self.is_found).unflatten(0, shape)
            args = (args[0].masked_fill(needed, float("inf")), *args[1:])
        return func(*args, **kwargs)

    def _with_live(self, scores: torch.Tensor, choose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """[T, K] noted expert numbers, and what the router chooses for tokens of which nothing was noted."""
        noted, rows = self._noted(scores.shape[1]), self.found.live_rows
        if rows is None:
            return torch.where(self.is_found, noted, choose(scores))
        return noted if len(rows) == 0 else noted.index_copy_(0, rows, choose(scores.index_select(0, rows)))

    def _noted(self, width: int) -> torch.Tensor:
        """[T, K] expert numbers; those of unused slots are valid and no matter."""
        self.is_used = self.table < width
        return self.table.clamp(max=width - 1)

    def check(self, output: Any) -> None:
        """Refuse a router that chose without `topk`, unless it chose the same (by a table of tokens, as V4's first).

        Args:
            output: What the router returned.

        Raises:
            ValueError: It chose otherwise, or another number of experts.
        """
        if self.num_calls == 1:
            return
        choice = read_choice(output, self.layer.logits_place)
        indices = None if choice is None else choice.topk_indices
        if indices is not None and indices.shape[1] != self.table.shape[1]:
            raise ValueError(
                f"router_replay: got {self.table.shape[1]} experts per token, expected {indices.shape[1]} as "
                f"{type(self.layer.router).__name__} chooses"
            )
        if self.num_calls or indices is None or not bool(((indices == self.table) | ~self.is_found).all()):
            raise ValueError(
                f"router_replay: got {type(self.layer.router).__name__} with {self.num_calls} calls of topk over its "
                "experts, expected 1; this router cannot be replayed"
            )
