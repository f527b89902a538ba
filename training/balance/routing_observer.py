"""Counts what the routers of any MoE choose while it trains, and attaches balance losses to stock ones.

`ExpertBalanceCallback` and `TrainingFigures` own one. It hooks each router and the decoder around it, of our models
and of every family in `modeling_deepseek/families.py`. A pass is counted if its decoder runs in training mode with
gradients: no evaluation, no rollout. The decoder's hooks open and close the pass, so a layer that activation
checkpointing runs again, inside the backward pass, is not counted twice. Under `torch.compile` the counts are part of
the compiled graph.

Axes: T tokens, E experts, K experts per token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from modeling_deepseek.auxiliary_loss import AttachLoss, router_z_loss, sequence_balance_loss
from modeling_deepseek.families import MoeLayer, find_moe_layers
from modeling_deepseek.router_output import RouterChoice, read_choice
from modeling_deepseek.token_layout import TokenLayout, make_layout, one_sequence

# Entropies are added up as whole numbers of this part of a nat: integers sum to the same in any order, on any ranks.
ENTROPY_UNIT = 2.0**-20


@dataclass(frozen=True)
class RouterLosses:
    """Weights of the balance losses that are attached to routers without losses of their own.

    Attributes:
        seq_aux_loss_coef: Of the sequence-wise balance loss.
        router_z_loss_coef: Of the router's z-loss.
    """

    seq_aux_loss_coef: float = 0.0
    router_z_loss_coef: float = 0.0

    def __bool__(self) -> bool:
        return self.seq_aux_loss_coef > 0 or self.router_z_loss_coef > 0


@dataclass(frozen=True)
class LayerCounts:
    """What one router chose.

    Attributes:
        tokens_per_expert: `[E]` int64, used slots only.
        tokens_per_count: `[K + 1]` int64, how many tokens used 0, 1, ... K experts; empty where the number is fixed.
        entropy: Of the softmax over all experts' logits, in nats, summed over tokens.
        num_tokens: Padding left out.
    """

    tokens_per_expert: torch.Tensor
    tokens_per_count: torch.Tensor
    entropy: float
    num_tokens: int

    def __add__(self, other: "LayerCounts") -> "LayerCounts":
        """Return the counts of both."""
        return LayerCounts(
            self.tokens_per_expert + other.tokens_per_expert,
            self.tokens_per_count + other.tokens_per_count,
            self.entropy + other.entropy,
            self.num_tokens + other.num_tokens,
        )


@dataclass(frozen=True)
class _Pass:
    """A training pass of a decoder that is under way."""

    layout: TokenLayout | None


@dataclass
class _Counter:
    """One router's counts as a row `[E + K + 1 + 2]` int64: per expert, per number of experts, entropy, tokens."""

    layer: MoeLayer
    row: torch.Tensor | None
    max_experts: int | None  # of a number that varies
    # Layouts of passes whose backward pass may run the layer again, the last first to be run again.
    layouts: list[TokenLayout | None] = field(default_factory=list)

    @classmethod
    def of(cls, layer: MoeLayer) -> "_Counter":
        share = getattr(layer.router, "share", None)
        max_experts = None if share is None else share.max_experts
        if layer.num_experts is None:
            return cls(layer, None, max_experts)
        return cls(layer, _empty_row(layer.num_experts, max_experts, _device_of(layer.router)), max_experts)

    @torch.no_grad()
    def add(self, choice: RouterChoice, layout: TokenLayout | None) -> None:
        if self.row is None:
            self.row = _empty_row(choice.num_experts, self.max_experts, choice.router_logits.device)
        is_token = None if layout is None else layout.is_token
        num_counts = 0 if self.max_experts is None else self.max_experts + 1
        parts = [choice.tokens_per_expert(is_token, len(self.row) - num_counts - 2)]
        if self.max_experts is not None:
            parts.append(choice.tokens_per_count(is_token, self.max_experts))
        entropies = (choice.entropies() / ENTROPY_UNIT).round().long()
        ones = torch.ones_like(entropies)
        if is_token is not None:
            entropies, ones = entropies * is_token, ones * is_token
        parts.append(torch.stack([entropies.sum(), ones.sum()]))
        self.row += torch.cat(parts)

    def read(self, row: torch.Tensor) -> LayerCounts:
        num_counts = 0 if self.max_experts is None else self.max_experts + 1
        num_experts = len(row) - num_counts - 2
        entropy, num_tokens = row[-2:].tolist()
        counts = row[num_experts : num_experts + num_counts]
        return LayerCounts(row[:num_experts], counts, entropy * ENTROPY_UNIT, num_tokens)


def _empty_row(num_experts: int, max_experts: int | None, device: torch.device) -> torch.Tensor:
    num_counts = 0 if max_experts is None else max_experts + 1
    return torch.zeros(num_experts + num_counts + 2, dtype=torch.int64, device=device)


def _device_of(module: nn.Module) -> torch.device:
    tensor = next(iter([*module.parameters(), *module.buffers()]), None)
    return torch.device("cpu") if tensor is None else tensor.device


class RoutingObserver:
    """Hooks a model's routers, counts their choices, and attaches losses.

    Args:
        model: Any model.
        losses: Attached to routers that have none of their own.
        report: Called with a router's class name where its output does not tell which experts it chose.

    Attributes:
        layers: The model's MoE layers.
        num_passes: Forward passes per optimizer step, for the size of the losses.
        has_passes: Whether a pass was counted since the last `take`.

    Raises:
        ValueError: A loss cannot be attached to a router of this model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        losses: RouterLosses | None = None,
        report: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.layers = find_moe_layers(model)
        self.losses = losses or RouterLosses()
        self.num_passes = 1
        self.has_passes = False
        self._report = report
        self._counters = [_Counter.of(layer) for layer in self.layers]
        self._decoders = list(dict.fromkeys(layer.decoder for layer in self.layers))
        self._open: list[_Pass | None] = [None] * len(self._decoders)
        self._handles: list[Any] = []
        if self.losses:
            self._refuse_losses()

    def _refuse_losses(self) -> None:
        for layer in self.layers:
            name = type(layer.router).__name__
            if has_own_losses(layer.router):
                raise ValueError(
                    f"seq_aux_loss_coef, router_z_loss_coef: got {self.losses.seq_aux_loss_coef}, "
                    f"{self.losses.router_z_loss_coef} for {name}, expected 0; set them in the model's configuration"
                )
            if layer.experts is None:
                raise ValueError(
                    f"seq_aux_loss_coef, router_z_loss_coef: got {self.losses.seq_aux_loss_coef}, "
                    f"{self.losses.router_z_loss_coef} for {name}, expected 0; its output has no weights to attach to"
                )
            if layer.scores == "probabilities" and self.losses.router_z_loss_coef > 0:
                raise ValueError(
                    f"router_z_loss_coef: got {self.losses.router_z_loss_coef} for {name}, expected 0; it returns no "
                    "logits"
                )

    def attach(self) -> "RoutingObserver":
        """Begin to observe."""
        for place, decoder in enumerate(self._decoders):
            self._handles.append(decoder.register_forward_pre_hook(partial(self._begin_pass, place), with_kwargs=True))
            self._handles.append(decoder.register_forward_hook(partial(self._end_pass, place), always_call=True))
        for number, layer in enumerate(self.layers):
            place = self._decoders.index(layer.decoder)
            self._handles.append(layer.router.register_forward_hook(partial(self._see, number, place)))
        return self

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self, *, over_ranks: bool) -> list[LayerCounts]:
        """Return the counts since the last call, one per layer that was counted, and begin anew.

        Args:
            over_ranks: Sum over all processes. A collective operation: every process calls it.
        """
        counters = [counter for counter in self._counters if counter.row is not None]
        own_rows = [counter.row for counter in counters if counter.row is not None]
        if not own_rows:
            return []
        flat = torch.cat([row.to(own_rows[0].device) for row in own_rows])
        if over_ranks and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(flat)
        rows = flat.cpu().split([len(row) for row in own_rows])  # the step's only wait for the GPU
        for counter, row in zip(counters, own_rows, strict=True):
            row.zero_()
            counter.layouts.clear()
        self.has_passes = False
        return [counter.read(row) for counter, row in zip(counters, rows, strict=True)]

    @property
    def counted_layers(self) -> Sequence[MoeLayer]:
        """The layers that `take` returns counts of, in its order."""
        return [counter.layer for counter in self._counters if counter.row is not None]

    def _begin_pass(self, place: int, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if decoder.training and torch.is_grad_enabled():
            self._open[place] = _Pass(layout_of(args, kwargs))
            self.has_passes = True

    def _end_pass(self, place: int, decoder: nn.Module, args: tuple[Any, ...], output: object) -> None:
        self._open[place] = None

    def _see(self, number: int, place: int, router: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        counter, opened = self._counters[number], self._open[place]
        if opened is None and not (self.losses and router.training and torch.is_grad_enabled() and counter.layouts):
            return None
        choice = read_choice(output, counter.layer.logits_place)
        if choice is None:
            self._report(type(router).__name__)
            return None
        if opened is None:  # the backward pass runs a checkpointed layer again
            layout = counter.layouts.pop()
        else:
            layout = opened.layout
            if layout is not None and len(layout.sequence_ids) != len(choice.router_logits):
                layout = None  # tokens of another kind than the decoder's input, those of images for example
            counter.add(choice, layout)
            if self.losses:
                counter.layouts.append(layout)
        return self._with_losses(counter.layer, output, choice, layout) if self.losses else None

    def _with_losses(self, layer: MoeLayer, output: Any, choice: RouterChoice, layout: TokenLayout | None) -> Any:
        if not torch.is_grad_enabled():  # reentrant checkpointing runs the layer first without gradients
            return None
        layout = one_sequence(choice.router_logits) if layout is None else layout
        loss = choice.router_logits.new_zeros((), dtype=torch.float32)
        if self.losses.seq_aux_loss_coef > 0:
            scores = layer.compute_scores(choice.router_logits)
            balance = sequence_balance_loss(scores, choice.topk_indices, choice.is_used, layout)
            loss = loss + self.losses.seq_aux_loss_coef * balance
        if self.losses.router_z_loss_coef > 0:
            loss = loss + self.losses.router_z_loss_coef * router_z_loss(choice.router_logits.float(), layout)
        weights = AttachLoss.apply(output[1], loss / self.num_passes)
        return (output[0], weights, *output[2:])


def has_own_losses(router: nn.Module) -> bool:
    """Return whether a router is ours and attaches its losses itself; asked of its class, which remote code copies."""
    return hasattr(type(router), "finish_step")


def layout_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout | None:
    """The layout of a decoder's input; None where its arguments do not tell it."""
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    if not isinstance(tokens, torch.Tensor) or tokens.ndim < 2:
        return None
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None and len(args) > 1:
        mask = args[1]
    if isinstance(mask, torch.Tensor) and (mask.ndim != 2 or len(mask) != len(tokens)):
        mask = None
    return make_layout(tokens.shape[:2], tokens.device, mask, positions)
