"""Which experts every token of some passages took, read from the routers while the model runs.

Axes: T tokens of all passages, K slots per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from deepseek_eval.interpret.passages import Passage, make_batch
from modeling_deepseek.families import MoeLayer, find_moe_layers
from modeling_deepseek.router_output import RouterChoice, read_choice


@dataclass(frozen=True)
class RoutedTokens:
    """Tokens with the experts they took.

    Attributes:
        token_ids: `[T]`.
        passages: `[T]`, the number of each token's passage.
        positions: `[T]`, from the beginning of the passage.
        experts: By layer `[T, K]`, -1 where a slot is unused.
        num_experts: By layer.
    """

    token_ids: np.ndarray
    passages: np.ndarray
    positions: np.ndarray
    experts: list[np.ndarray]
    num_experts: list[int]


def find_layers(model: nn.Module) -> list[MoeLayer]:
    """Return the layers of routed experts.

    Args:
        model: Of any family.

    Raises:
        ValueError: There are none.
    """
    layers = find_moe_layers(model)
    if not layers:
        raise ValueError(f"model: got {type(model).__name__}, a dense model, expected one with routed experts")
    return layers


def layer_number(layer: MoeLayer) -> str:
    """Return a layer's number in the model, or its name where it has none.

    Args:
        layer: From `find_layers`.
    """
    return next((part for part in layer.name.split(".") if part.isdigit()), layer.name)


@torch.no_grad()
def read_routing(
    model: PreTrainedModel,
    passages: Sequence[Passage],
    *,
    batch_size: int = 16,
    tell: Callable[[int], Any] = lambda done: None,
) -> RoutedTokens:
    """Run the model over the passages and return what every router chose.

    Args:
        model: In evaluation mode.
        passages: What to read.
        batch_size: Passages at once.
        tell: Called with the number of passages done.

    Raises:
        ValueError: A router does not tell its choice per token.
    """
    layers = find_layers(model)
    chosen: list[list[np.ndarray]] = [[] for _ in layers]
    widths = [0] * len(layers)
    is_token = torch.zeros(0, dtype=torch.bool)

    def note(number: int) -> Callable[..., None]:
        def hook(router: nn.Module, args: Any, output: Any) -> None:
            choice = choice_of(layers[number], output)
            widths[number] = choice.num_experts
            chosen[number].append(slots_of(choice)[is_token.flatten().to(choice.router_logits.device)].cpu().numpy())

        return hook

    hooks = [layer.router.register_forward_hook(note(number)) for number, layer in enumerate(layers)]
    try:
        for begin in range(0, len(passages), batch_size):
            ids, mask = make_batch(passages[begin : begin + batch_size])
            is_token = torch.from_numpy(mask)
            model(input_ids=torch.from_numpy(ids).to(model.device), use_cache=False)
            tell(len(ids))
    finally:
        for one in hooks:
            one.remove()
    sizes = [len(passage.token_ids) for passage in passages]
    return RoutedTokens(
        token_ids=np.concatenate([passage.token_ids for passage in passages]),
        passages=np.repeat(np.arange(len(passages)), sizes),
        positions=np.concatenate([np.arange(size) for size in sizes]),
        experts=[np.concatenate(parts) for parts in chosen],
        num_experts=widths,
    )


def choice_of(layer: MoeLayer, output: object) -> RouterChoice:
    """Return what a router chose.

    Args:
        layer: Its layer.
        output: What it returned.

    Raises:
        ValueError: It does not tell it per token.
    """
    choice = read_choice(output, layer.logits_place)
    if choice is None or choice.load is not None:
        raise ValueError(
            f"model: got {type(layer.router).__name__}, expected a router that tells each token's experts"
        )
    return choice


def slots_of(choice: RouterChoice) -> torch.Tensor:
    """Return the experts of each token, `[T, K]` int16, -1 where a slot is unused.

    Args:
        choice: A router's.
    """
    if choice.is_chosen is None:
        assert choice.topk_indices is not None
        return choice.topk_indices.masked_fill(~choice.is_used, -1).short()
    most = int(choice.is_chosen.sum(1).max())
    found = choice.is_chosen.short().topk(most, dim=1)
    return found.indices.masked_fill(found.values == 0, -1).short()
