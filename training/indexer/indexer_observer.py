"""Attaches the indexer's loss to the training passes of stock sparse attention, by hooks.

`IndexerTrainingCallback` owns one. In a pass each layer's loss and its gradient are computed at once, when the layer
first runs, and the graph of that layer is freed; the decoder's output then hands the gradients to the backward pass.
So the main model's gradient is not touched, layers that activation checkpointing runs again cost nothing more, and
what reduces or scales gradients over ranks sees those of the indexer as any others.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.modeling_utils import AttentionInterface

from deepseek_training.balance.routing_observer import layout_of
from deepseek_training.indexer.indexer_loss import attention_on_candidates, indexer_kl
from deepseek_training.indexer.indexer_scores import (
    Candidates,
    IndexedLayer,
    find_indexed_layers,
    own_graph,
    score_candidates,
)
from modeling_deepseek.token_layout import TokenLayout

# What computes attention with a mask that the indexer's choice is part of.
MASKED_ATTENTION = ("eager", "sdpa")


@dataclass
class _Pass:
    """A training pass of a decoder that is under way."""

    layout: TokenLayout | None
    pending: dict[IndexedLayer, Candidates] = field(default_factory=dict)
    gradients: dict[nn.Parameter, torch.Tensor] = field(default_factory=dict)


class IndexerObserver:
    """Hooks a model's indexers and the attention around them.

    Args:
        model: Any model with indexers.
        loss_coef: Weight of the loss.

    Attributes:
        layers: Those with an indexer.
        num_passes: Forward passes per optimizer step, for the size of the loss.
        is_dense: Whether the attention sees everything in training, as in the warm-up.
        figures: fp32 sums since they were last cleared, by name: `kl` and `kl_count` over layers and passes, `recall`
            and `recall_count` over queries of dense passes.

    Raises:
        ValueError: The model has no indexer, or one that cannot be trained.
    """

    def __init__(self, model: nn.Module, loss_coef: float = 1.0) -> None:
        self.layers = find_indexed_layers(model)
        self.loss_coef = loss_coef
        self.num_passes = 1
        self.is_dense = False
        self.figures: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._open: dict[nn.Module, _Pass] = {}
        self._budgets: dict[nn.Module, int] = {}
        self._owners = {module: layer for layer in self.layers for module in layer.ancestors}
        self._refuse(model)

    def _refuse(self, model: nn.Module) -> None:
        if not self.layers:
            raise ValueError(f"model: got {type(model).__name__}, expected one whose attention has an indexer")
        for layer in self.layers:
            if not layer.parameters:
                raise ValueError(
                    f"indexer: got {layer.name} frozen, expected parameters that require a gradient; "
                    "with LoRA pass PEFT modules_to_save=['indexer']"
                )
            if any(isinstance(parameter, DTensor) for parameter in layer.parameters):
                raise ValueError(f"indexer: got {layer.name} in parts over several devices, expected it whole")
            used = layer.decoder.config._attn_implementation
            if used not in MASKED_ATTENTION:
                raise ValueError(f"attn_implementation: got {used}, expected {' or '.join(MASKED_ATTENTION)}")

    @property
    def device(self) -> torch.device:
        """Where the first indexer is."""
        return self.layers[0].parameters[0].device

    def attach(self) -> "IndexerObserver":
        """Begin to observe."""
        for decoder in dict.fromkeys(layer.decoder for layer in self.layers):
            self._handles.append(decoder.register_forward_pre_hook(self._begin_pass, with_kwargs=True))
            self._handles.append(decoder.register_forward_hook(self._end_pass, always_call=True))
        for layer in self.layers:
            before, after = partial(self._widen, layer), partial(self._see_choice, layer)
            self._handles.append(layer.indexer.register_forward_pre_hook(before, with_kwargs=True))
            self._handles.append(layer.indexer.register_forward_hook(after, with_kwargs=True, always_call=True))
        _listen(self)
        return self

    def detach(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._open.clear()
        _stop_listening(self)

    # Hooks ----------------------------------------------------------------------------------------------------------

    def _begin_pass(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if decoder.training and torch.is_grad_enabled():
            self._open[decoder] = _Pass(layout_of(args, kwargs))

    def _end_pass(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        opened = self._open.pop(decoder, None)
        if opened is None or output is None:  # no training pass, or one that raised
            return None
        if opened.pending:
            name = next(iter(opened.pending)).name
            raise ValueError(f"indexer: got {name}, expected one in attention of transformers' attention interface")
        for layer in self.layers:  # in every pass the same parameters, or ranks would wait for one another
            if layer.decoder is decoder:
                for parameter in layer.parameters:
                    opened.gradients.setdefault(parameter, torch.zeros_like(parameter))
        return _with_gradients(output, opened.gradients)

    def _widen(self, layer: IndexedLayer, indexer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the indexer choose everything, also where a checkpointed layer runs again."""
        self._budgets[indexer] = indexer.index_topk
        if self.is_dense and indexer.training:
            hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            width = layer.keys_per_candidate
            indexer.index_topk = max(indexer.index_topk, -(-hidden_states.shape[1] // width) * width)

    def _see_choice(
        self, layer: IndexedLayer, indexer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        try:
            opened = self._open.get(layer.decoder)
            if opened is not None and output is not None:
                opened.pending[layer] = score_candidates(layer, args, kwargs, output)
        finally:
            indexer.index_topk = self._budgets.get(indexer, indexer.index_topk)

    def see_attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        attention_mask: torch.Tensor,
        scaling: float,
        sinks: torch.Tensor | None,
    ) -> None:
        """Compute a layer's loss and gradient where its attention is called, if its indexer has just run.

        Args:
            module: Whose attention it is.
            query: `[B, N, S, H]`.
            key: `[B, N / G, T, H]`.
            attention_mask: `[B, 1, S, T]`, with the indexer's choice in it.
            scaling: Factor of the logits.
            sinks: `[N]` or None.
        """
        layer = self._owners.get(module)
        opened = None if layer is None else self._open.get(layer.decoder)
        candidates = None if layer is None or opened is None else opened.pending.pop(layer, None)
        if layer is None or opened is None or candidates is None or not candidates.index_scores.shape[-1]:
            return
        # DeepSeek-V4's candidates are the compressed keys, which stand behind those of its window.
        offset = key.shape[2] - candidates.num_scored if layer.keys_per_candidate == 1 else 0
        places = torch.where(candidates.places < 0, -1, candidates.places + offset)
        with torch.autocast(query.device.type, enabled=False):
            attention = attention_on_candidates(query, key, attention_mask, scaling, places, sinks)
            self._add(layer, opened, candidates, attention)

    def _add(self, layer: IndexedLayer, opened: _Pass, candidates: Candidates, attention: torch.Tensor) -> None:
        with torch.enable_grad(), own_graph():
            divergence, is_counted = indexer_kl(candidates.index_scores, attention, candidates.is_valid)
            layout = opened.layout
            if layout is not None and len(layout.sequence_ids) == is_counted.numel():
                is_counted = is_counted & layout.is_token.view_as(is_counted)
            mean = (divergence * is_counted).sum() / is_counted.sum().clamp(min=1)
            loss = self.loss_coef / self.num_passes * mean
            found = torch.autograd.grad(loss, layer.parameters, allow_unused=True)
        for parameter, gradient in zip(layer.parameters, found, strict=True):
            if gradient is not None:
                before = opened.gradients.get(parameter)
                opened.gradients[parameter] = gradient if before is None else before + gradient
        self._note("kl", mean.detach(), 1)
        if self.is_dense:
            self._note_recall(layer, candidates, attention, is_counted)

    def _note_recall(
        self, layer: IndexedLayer, candidates: Candidates, attention: torch.Tensor, is_counted: torch.Tensor
    ) -> None:
        """Note how much of the attention the sparse stage would keep, where a query has more than that to see."""
        kept = self._budgets[layer.indexer] // layer.keys_per_candidate
        attention = attention.masked_fill(~candidates.is_valid, 0.0)
        is_cut = is_counted & (candidates.is_valid.sum(-1) > kept)
        shares = attention[..., :kept].sum(-1) / attention.sum(-1).clamp(min=1e-30)
        self._note("recall", (shares * is_cut).sum(), is_cut.sum())

    def _note(self, name: str, value: torch.Tensor, count: torch.Tensor | int) -> None:
        for key, number in ((name, value), (f"{name}_count", torch.as_tensor(count, device=value.device))):
            self.figures[key] = self.figures.get(key, torch.zeros((), device=value.device)) + number.float()


# The attention's queries and keys -----------------------------------------------------------------------------------

_LISTENERS: list[IndexerObserver] = []
_get_interface = AttentionInterface.get_interface


def _listen(observer: IndexerObserver) -> None:
    """Let an observer see each call of transformers' attention functions."""
    _LISTENERS.append(observer)
    AttentionInterface.get_interface = _get_heard_interface


def _stop_listening(observer: IndexerObserver) -> None:
    if observer in _LISTENERS:
        _LISTENERS.remove(observer)
    if not _LISTENERS:
        AttentionInterface.get_interface = _get_interface


def _get_heard_interface(self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]) -> Any:
    attend = _get_interface(self, attn_implementation, default)

    def attend_and_tell(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        for observer in _LISTENERS:
            if attention_mask is not None and "scaling" in kwargs:
                observer.see_attention(
                    module, query.detach(), key.detach(), attention_mask, kwargs["scaling"], kwargs.get("s_aux")
                )
        return attend(module, query, key, value, attention_mask, *args, **kwargs)

    return attend_and_tell


# The gradients' way into the backward pass ---------------------------------------------------------------------------


class _AttachGradients(torch.autograd.Function):
    """Passes a tensor through, and in the backward pass gives parameters gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, gradients: list[torch.Tensor], *parameters: nn.Parameter) -> Any:
        """Return `tensor`.

        Args:
            ctx: Autograd's.
            tensor: On the way to the model's loss.
            gradients: One per parameter.
            parameters: Theirs.
        """
        ctx.gradients = gradients
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradient as it came, and the known ones.

        Args:
            ctx: Autograd's.
            gradient: Of the tensor.
        """
        return gradient, None, *ctx.gradients


def _with_gradients(output: Any, gradients: dict[nn.Parameter, torch.Tensor]) -> Any:
    """The decoder's output, whose backward pass hands out the gradients."""
    first = output[0]
    attached = _AttachGradients.apply(first, list(gradients.values()), *gradients)
    if isinstance(output, tuple):
        return (attached, *output[1:])
    output[next(iter(output.keys()))] = attached
    return output
