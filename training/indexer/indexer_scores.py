"""Finds the indexers of a model, and runs one again with gradients.

transformers runs its indexers without gradients and hands on only which keys they choose. `score_candidates` runs the
class's own code once more from detached inputs and takes the scores from the call of `topk` in it, so that no
formula of a family is written here. `IndexerObserver` calls both.

Axes: B sequences, S queries, K chosen candidates, P keys per candidate.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import Cache, PreTrainedModel

# The module's name, and the one of the copy that PEFT's modules_to_save trains.
_NAME = re.compile(r"(^|\.)indexer(\.modules_to_save\.[^.]+)?$")
# Masks add fp16's lowest number or a lower one to a score.
_MASKED = torch.finfo(torch.float16).min / 2


@dataclass(frozen=True, eq=False)
class IndexedLayer:
    """One layer of sparse attention with an indexer of its own.

    Attributes:
        name: The indexer's, as in `named_modules`.
        indexer: The module that chooses.
        ancestors: The modules around it, below the decoder; the attention is one of them.
        decoder: The innermost `PreTrainedModel` around it; what runs it is one call of this.
    """

    name: str
    indexer: nn.Module
    ancestors: tuple[nn.Module, ...]
    decoder: nn.Module

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The indexer's parameters that are trained."""
        return [parameter for parameter in self.indexer.parameters() if parameter.requires_grad]

    @property
    def keys_per_candidate(self) -> int:
        """P: 1, or what GLM-5-next's indexer pools into one."""
        return int(vars(self.indexer).get("index_kpool", 1))


@dataclass(frozen=True)
class Candidates:
    """What an indexer chose, the best first.

    Attributes:
        index_scores: `[B, S, K]`, with gradient.
        places: `[B, S, K, P]` int64; -1 where there is no key.
        is_valid: `[B, S, K]` bool: seen by the query.
        num_scored: How many the indexer had to choose from.
    """

    index_scores: torch.Tensor
    places: torch.Tensor
    is_valid: torch.Tensor
    num_scored: int


def find_indexed_layers(model: nn.Module) -> list[IndexedLayer]:
    """Return the layers with an indexer, in order.

    Args:
        model: Any model, wrapped or not.

    Raises:
        ValueError: An indexer is of a kind that cannot be trained here.
    """
    modules = dict(model.named_modules())
    found = []
    for name, module in modules.items():
        if not _NAME.search(name) or hasattr(module, "original_module"):
            continue
        if not isinstance(vars(module).get("index_topk"), int):
            raise ValueError(
                f"indexer: got {type(module).__name__}, expected one that scores keys and keeps index_topk of them; "
                "it chooses blocks of keys, and its scores do not give a distribution over what the attention sees"
            )
        parts = name.split(".")
        around = [modules[".".join(parts[:depth])] for depth in range(len(parts))]
        place = max((i for i, other in enumerate(around) if isinstance(other, PreTrainedModel)), default=0)
        found.append(IndexedLayer(name, module, tuple(around[place + 1 :]), around[place]))
    return found


def score_candidates(
    layer: IndexedLayer, args: Sequence[Any], kwargs: Mapping[str, Any], chosen: torch.Tensor
) -> Candidates:
    """Run an indexer once more, with gradients that reach its own parameters only.

    Args:
        layer: Its layer.
        args: What it was called with.
        kwargs: Likewise.
        chosen: What it returned, `[B, S, at least K P]`: of equal scores the attention sees those.

    Raises:
        ValueError: It does not make one choice for all queries.
    """
    name = type(layer.indexer).__name__
    detached_args, detached = tree_map(_detached, (tuple(args), dict(kwargs)), is_leaf=_is_cache)
    forward = inspect.unwrap(type(layer.indexer).forward)  # what torch.no_grad wraps
    with torch.enable_grad(), own_graph(), _Choices() as choices:
        again = forward(layer.indexer, *detached_args, **detached)
    if len(choices.seen) != 1 or choices.seen[0][0].ndim != 3 or not isinstance(again, torch.Tensor):
        raise ValueError(
            f"indexer: got {name} with choices among scores of shape "
            f"{[tuple(scores.shape) for scores, _ in choices.seen]}, expected one choice among [B, S, keys]"
        )
    scores, values = choices.seen[0]
    width = layer.keys_per_candidate
    if width == 1:  # the places are those of the scores
        with torch.enable_grad(), own_graph():
            values = scores.gather(-1, chosen.long().clamp(min=0)) if scores.shape[-1] else values
    else:
        chosen = again
    places = chosen[..., : values.shape[-1] * width].long().reshape(*values.shape, width)
    is_valid = (values.detach() > _MASKED) & (places >= 0).all(-1)
    return Candidates(values, places, is_valid, scores.shape[-1])


def own_graph() -> saved_tensors_hooks:
    """Return a context whose graph keeps its tensors, out of sight of the activation checkpointing around it."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class _Choices(TorchFunctionMode):
    """Keeps the scores that `topk` is called with, and the chosen among them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            self.seen.append((args[0], result[0]))
        return result


def _is_cache(value: object) -> bool:
    return isinstance(value, Cache)


def _detached(value: Any) -> Any:
    """Without graph, and without the cache: it already holds the keys of this pass."""
    if _is_cache(value):
        return None
    return value.detach() if isinstance(value, torch.Tensor) else value
