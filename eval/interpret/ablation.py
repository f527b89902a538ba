"""What is lost without an expert: the loss of each domain with the expert masked, paired with the loss as it is.

The router then chooses among the rest, so the figure is what the expert adds over its replacement. Errors count
documents. Which experts are tried first is told by a first-order estimate from one backward pass.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from deepseek_eval.interpret.information import benjamini_hochberg
from deepseek_eval.interpret.passages import Passage, make_batch
from deepseek_eval.interpret.routed_tokens import choice_of, layer_number
from deepseek_eval.interpret.steered_router import masked_expert
from deepseek_records.statistics import ratio_with_error
from modeling_deepseek.families import MoeLayer


@dataclass(frozen=True)
class Effect:
    """What masking one expert does to the loss.

    Attributes:
        layer: Its layer's number in the model.
        expert: Its number.
        estimate: By domain, the first-order estimate, nats per token.
        change: By domain, loss without it minus loss with it, nats per token.
        stderr: By domain, paired over documents; None of a single document.
        q_value: By domain, the false discovery rate over all cells measured; None without error.
    """

    layer: str
    expert: int
    estimate: tuple[float, ...]
    change: tuple[float, ...]
    stderr: tuple[float | None, ...]
    q_value: tuple[float | None, ...]


@torch.no_grad()
def score_passages(model: PreTrainedModel, passages: Sequence[Passage], batch_size: int = 16) -> np.ndarray:
    """Return each passage's summed -log P in nats, `[P]` fp64.

    Args:
        model: In evaluation mode.
        passages: P passages; a begin token is given, everything after it is scored.
        batch_size: Passages at once.
    """
    sums = [
        _losses(model, passages[begin : begin + batch_size]).cpu().numpy()
        for begin in range(0, len(passages), batch_size)
    ]
    return np.concatenate(sums)


def _losses(model: PreTrainedModel, passages: Sequence[Passage]) -> torch.Tensor:
    ids, is_token = (torch.from_numpy(part).to(model.device) for part in make_batch(passages))
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (losses.double() * is_token[:, 1:]).sum(1)


def estimate_effects(
    model: PreTrainedModel, layers: Sequence[MoeLayer], passages: Sequence[Passage], batch_size: int = 16
) -> list[np.ndarray]:
    """Return the first-order change of the loss without each expert, by layer `[C, E]` in nats per token.

        change = - sum over tokens of weight * d loss / d weight

    of an expert's routing weights: as if they were set to 0, and nothing took the expert's place. Where a router's
    weights cannot be reached, the expert's tokens are counted in its place.

    Args:
        model: In evaluation mode.
        layers: Its layers of routed experts.
        passages: What to read; C domains in the order of their first passage.
        batch_size: Passages at once.
    """
    domains = list(dict.fromkeys(passage.domain for passage in passages))
    sizes = np.zeros(len(domains))
    sums: list[Any] = [0.0] * len(layers)
    for begin in range(0, len(passages), batch_size):
        part = passages[begin : begin + batch_size]
        rows = np.array([domains.index(passage.domain) for passage in part])
        np.add.at(sizes, rows, [len(passage.token_ids) - 1 for passage in part])
        with torch.enable_grad(), _weights_as_leaves(layers) as found:
            _losses(model, part).sum().backward()
        for number, (weights, experts, width) in enumerate(found):
            gradient = torch.zeros_like(weights) if weights.grad is None else weights.grad
            per_slot = -(weights.detach() * gradient).double().cpu().numpy()
            tokens = per_slot.shape[0] // len(part)
            table = np.zeros((len(domains), width + 1))
            slots = experts.clamp(max=width).cpu().numpy()
            np.add.at(table, (np.repeat(rows, tokens)[:, None], slots), per_slot)
            sums[number] = sums[number] + table[:, :width]
    return [np.asarray(one) / np.maximum(sizes, 1)[:, None] for one in sums]


@contextmanager
def _weights_as_leaves(layers: Sequence[MoeLayer]) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, int]]]:
    """While it holds, routers return weights that gather a gradient; only those do."""
    found: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def note(layer: MoeLayer) -> Callable[..., Any]:
        def hook(router: nn.Module, args: Any, output: Any) -> Any:
            choice = choice_of(layer, output)
            if choice.topk_indices is None or choice.topk_weights is None:
                assert choice.is_chosen is not None
                taken = choice.is_chosen.float().requires_grad_()
                taken.grad = -taken.detach()  # counts the tokens
                experts = torch.arange(choice.num_experts, device=taken.device).expand(len(taken), -1)
                found.append((taken, experts, choice.num_experts))
                return None
            weights = output[1].detach().requires_grad_()
            flat = weights.reshape(choice.topk_indices.shape) if weights.ndim != 2 else weights
            flat.retain_grad()
            found.append((flat, choice.topk_indices, choice.num_experts))
            return (output[0], flat.view_as(weights), *output[2:])

        return hook

    hooks = [layer.router.register_forward_hook(note(layer)) for layer in layers]
    parameters = [(one, one.requires_grad) for layer in layers for one in layer.decoder.parameters()]
    for parameter, _ in parameters:
        parameter.requires_grad_(False)
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()
        for parameter, was in parameters:
            parameter.requires_grad_(was)


def measure_effects(
    model: PreTrainedModel,
    layers: Sequence[MoeLayer],
    passages: Sequence[Passage],
    experts: Sequence[tuple[int, int]],
    estimates: Sequence[np.ndarray],
    *,
    batch_size: int = 16,
    tell: Callable[[], Any] = lambda: None,
) -> list[Effect]:
    """Return what masking each expert does.

    Args:
        model: In evaluation mode.
        layers: Its layers of routed experts.
        passages: What to read.
        experts: Place in `layers` and number of each expert to mask.
        estimates: From `estimate_effects`.
        batch_size: Passages at once.
        tell: Called after each expert.

    Raises:
        ValueError: There is no such expert, or its router cannot do without it.
    """
    before = score_passages(model, passages, batch_size)
    measured = []
    for place, expert in experts:
        with masked_expert(layers[place], expert):
            change = score_passages(model, passages, batch_size) - before
        measured.append(change_by_domain(passages, change))
        tell()
    q_values = iter(_q_values(measured))
    return [
        Effect(
            layer=layer_number(layers[place]),
            expert=expert,
            estimate=tuple(map(float, estimates[place][:, expert])),
            change=tuple(change for change, _ in rows),
            stderr=tuple(stderr for _, stderr in rows),
            q_value=tuple(next(q_values) for _ in rows),
        )
        for (place, expert), rows in zip(experts, measured, strict=True)
    ]


def change_by_domain(passages: Sequence[Passage], change: np.ndarray) -> list[tuple[float, float | None]]:
    """Return each domain's change in nats per token, with its error over documents.

    Args:
        passages: P passages; domains come in the order of their first.
        change: `[P]` change of each passage's loss, in nats.
    """
    rows = []
    for domain in dict.fromkeys(passage.domain for passage in passages):
        chosen = [number for number, passage in enumerate(passages) if passage.domain == domain]
        targets = [float(len(passages[number].token_ids) - 1) for number in chosen]
        documents = [passages[number].document for number in chosen]
        rows.append(ratio_with_error([float(change[number]) for number in chosen], targets, documents))
    return rows


def _q_values(measured: Sequence[Sequence[tuple[float, float | None]]]) -> list[float | None]:
    """Two-sided, by the normal distribution."""
    cells = [cell for rows in measured for cell in rows]
    p_values = [
        math.erfc(abs(value) / error / math.sqrt(2)) if error else float(value == 0)
        for value, error in cells
        if error is not None
    ]
    q_values = iter(benjamini_hochberg(np.array(p_values)))
    return [None if error is None else float(next(q_values)) for _, error in cells]


def rank_experts(estimates: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Return place of layer and number of all experts, those first whose largest estimate over domains is largest.

    Args:
        estimates: From `estimate_effects`.
    """
    worth = {
        (place, expert): float(value)
        for place, table in enumerate(estimates)
        for expert, value in enumerate(np.abs(table).max(0))
    }
    return sorted(worth, key=lambda one: -worth[one])
