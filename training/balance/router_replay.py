"""Router replay: what experts a rollout used is noted, and the training passes over its tokens use the same.

In 16 bits generation rounds otherwise than a full forward pass, so a few tokens go to other experts, and their
log-probabilities differ by far more than rounding. `RouterReplay` notes the choices while a model generates, and
replays the selection in every later pass over the same text: the weights stay live, so routers learn, and slots that
a dynamic number of experts left unused stay unused. It serves PPO, TRL's GRPO and RLOO and any loop, for our model and
every family of `modeling_deepseek/families.py` whose router tells its choice.

A token is found by a hash of its sequence up to itself. So a pass may hold other rows, in another order, padded,
packed or cut short; what was not generated is routed live, and the share that was replayed is a figure. A decoder that
is given embeddings by a model around it has that model's tokens, where these are all that it was given: passes with
images or sound are routed live.

Axes: T tokens, E experts, K slots per token.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from deepseek_training.balance.replayed_choice import FoundTokens, ReplayedChoice
from deepseek_training.balance.replayed_tokens import prefix_hashes, tokens_behind, tokens_of
from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.router_output import read_slots
from modeling_deepseek.token_layout import make_layout

logger = logging.get_logger(__name__)

_Step = tuple[torch.Tensor, torch.Tensor | None]  # token ids [B, S] and their part of the mask
_Chosen = tuple[torch.Tensor, torch.Tensor, int]  # a step's experts [T, K], their weights, E


@dataclass
class _Records:
    """What one decoder's routers chose, sorted by the hash of the text up to each token.

    An expert number of E or more is an unused slot's.
    """

    hashes: torch.Tensor | None = None  # [T]
    experts: dict[int, torch.Tensor] = field(default_factory=dict)  # by layer, [T, K] int16

    def add(self, hashes: torch.Tensor, experts: dict[int, torch.Tensor]) -> None:
        if self.hashes is not None:
            hashes = torch.cat([self.hashes, hashes])
            experts = {number: torch.cat([self.experts[number], new]) for number, new in experts.items()}
        self.hashes, order = hashes.sort(stable=True)
        self.experts = {number: table[order] for number, table in experts.items()}


@dataclass
class _Decoder:
    """A decoder, the numbers of its MoE layers, what it generates, its records and the pass that is under way.

    Attributes:
        given: What the model around it was given, where that makes the embeddings.
        cache: Of the generation.
    """

    module: nn.Module
    numbers: list[int]
    given: dict[str, Any] | None = None
    cache: Callable[[], object] = lambda: None
    steps: list[_Step] = field(default_factory=list)
    chosen: dict[int, list[_Chosen]] = field(default_factory=dict)
    records: _Records = field(default_factory=_Records)
    is_generating: bool = False
    found: FoundTokens | None = None


def check_router_replay(model: nn.Module, router_replay: bool) -> None:
    """Raise a one-line ValueError if replay is asked for of a model without routed experts.

    Args:
        model: Of any family.
        router_replay: The setting.
    """
    if router_replay:
        RouterReplay(model)


class RouterReplay:
    """Notes the experts of what a model generates and replays them in passes over the same tokens.

    Args:
        model: Any model that generates with a cache, wrapped or not.

    Attributes:
        num_tokens: Tokens of training passes since the last `take_share`, and of these how many were replayed.

    Raises:
        ValueError: The model has no routed experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = find_moe_layers(model)
        if not self.layers:
            raise ValueError(f"router_replay: got {type(model).__name__} without routed experts, expected a MoE model")
        by_decoder: dict[nn.Module, list[int]] = {}
        for number, layer in enumerate(self.layers):
            by_decoder.setdefault(layer.decoder, []).append(number)
        self._decoders = [_Decoder(module, numbers) for module, numbers in by_decoder.items()]
        self._pending: list[list[FoundTokens | None]] = [[] for _ in self.layers]
        self._modes: list[ReplayedChoice | None] = [None] * len(self.layers)
        self._tuner = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
        self._is_used_up = False
        self._handles: list[Any] = []
        self._counts: torch.Tensor | None = None

    def attach(self) -> "RouterReplay":
        """Begin to note and to replay."""
        for decoder in self._decoders:
            for outer in self._models_around(decoder.module):
                self._handles.append(outer.register_forward_pre_hook(partial(_take, decoder), with_kwargs=True))
                self._handles.append(outer.register_forward_hook(partial(_leave, decoder), always_call=True))
            module, begin, end = decoder.module, partial(self._begin, decoder), partial(self._end, decoder)
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(end, always_call=True))
            for number in decoder.numbers:
                router = self.layers[number].router
                self._handles.append(router.register_forward_pre_hook(partial(self._enter_router, decoder, number)))
                leave = partial(self._leave_router, decoder, number)
                self._handles.append(router.register_forward_hook(leave, always_call=True))
                share = getattr(router, "share", None)  # our routers' choice of how many experts are used
                if isinstance(share, nn.Module):
                    self._handles.append(share.register_forward_hook(partial(self._keep_unused, number)))
        return self

    def detach(self) -> None:
        """Forget everything and leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def clear(self) -> None:
        """Forget what was noted."""
        for decoder in self._decoders:
            decoder.records = _Records()
            decoder.steps.clear()
            decoder.chosen.clear()
        for pending in self._pending:
            pending.clear()

    def add(self, token_ids: list[int], experts: torch.Tensor) -> None:
        """Note the experts of a sequence that was generated elsewhere, such as vLLM's `routed_experts`.

        Args:
            token_ids: Prompt and completion, S tokens.
            experts: [S, L, K] or [S - 1, L, K] expert numbers of the L MoE layers, where the last token, which was
                sampled and never read, may be left out; a number below 0 or from E on is an unused slot.

        Raises:
            ValueError: Another number of tokens, layers or experts per token, or no numbers of experts.
        """
        if not isinstance(experts, torch.Tensor) or experts.is_floating_point():
            kind = getattr(experts, "dtype", type(experts).__name__)
            raise ValueError(f"router_replay: got experts of {kind}, expected a tensor of whole numbers")
        for decoder in self._decoders[:1]:
            expected = len(decoder.numbers)
            if experts.ndim != 3 or len(token_ids) - len(experts) not in (0, 1) or experts.shape[1] != expected:
                raise ValueError(
                    f"router_replay: got experts of shape {tuple(experts.shape)}, expected [{len(token_ids)} or "
                    f"{len(token_ids) - 1}, {expected}, K] for {len(token_ids)} tokens and {expected} MoE layers"
                )
            widths = {table.shape[1] for table in decoder.records.experts.values()} - {experts.shape[2]}
            if widths:
                raise ValueError(
                    f"router_replay: got {experts.shape[2]} experts per token, expected {min(widths)} as noted before"
                )
            ids = torch.tensor([token_ids[: len(experts)]], device=experts.device)
            tables = {}
            for place, number in enumerate(decoder.numbers):
                num_experts = self.layers[number].num_experts or int(experts.max()) + 1
                chosen = experts[:, place].long()
                tables[number] = chosen.masked_fill((chosen < 0) | (chosen >= num_experts), num_experts).short()
            decoder.records.add(prefix_hashes(ids, make_layout(ids.shape, ids.device, None, None)), tables)

    def take_share(self) -> float | None:
        """Return the share of the training passes' tokens that were replayed since the last call; None: no pass."""
        counts, self._counts = self._counts, None
        if counts is None:
            return None
        found, total = counts.tolist()
        return found / max(total, 1)

    def _models_around(self, module: nn.Module) -> list[nn.Module]:
        """Models that hand embeddings to a decoder, outermost first."""
        return [
            outer
            for outer in self.model.modules()
            if isinstance(outer, PreTrainedModel)
            and outer is not module
            and any(one is module for one in outer.modules())
        ]

    def _begin(self, decoder: _Decoder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        decoder.is_generating, decoder.found = False, None
        tokens = tokens_of(args, kwargs)
        if tokens is None and decoder.given is not None:
            tokens = tokens_behind(kwargs.get("inputs_embeds"), decoder.given)
            if tokens is None:
                logger.warning_once("router_replay: what holds images or sound is routed live, only text is replayed")
        masks = (
            kwargs.get("attention_mask", args[1] if len(args) > 1 else None),
            (decoder.given or {}).get("attention_mask"),
        )
        mask = next((one for one in masks if isinstance(one, torch.Tensor) and one.ndim == 2), None)
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # renamed in transformers 5.24
        if cache is not None:
            if not torch.is_grad_enabled():
                self._begin_step(decoder, tokens, mask, cache)
            return
        if tokens is None:
            return
        if self._tuner is not None and self._tuner.disable_adapters:
            return  # the reference, which has a choice of its own
        self._close_generation(decoder)
        hashes = decoder.records.hashes
        if hashes is None:
            return
        positions = kwargs.get("position_ids")  # of several modalities: one row for each axis, all equal for text
        positions = positions[0] if isinstance(positions, torch.Tensor) and positions.ndim == 3 else positions
        layout = make_layout(tokens.shape, tokens.device, mask, positions)
        own = prefix_hashes(tokens, layout)
        rows = torch.searchsorted(hashes, own).clamp(max=len(hashes) - 1)
        is_recomputed = torch.is_grad_enabled() and any(
            vars(part).get("gradient_checkpointing", False) for part in module.modules()
        )
        is_found = (hashes[rows] == own) & layout.is_token
        live_rows = None if is_found.device.type != "cpu" else (~is_found).nonzero().squeeze(1)
        decoder.found = FoundTokens(tokens.shape, rows, is_found, live_rows, is_recomputed)
        if torch.is_grad_enabled():
            self._is_used_up = True
            counts = torch.stack([decoder.found.is_found.sum(), layout.is_token.sum()])
            self._counts = counts if self._counts is None else self._counts + counts

    def _end(self, decoder: _Decoder, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        decoder.is_generating, decoder.found = False, None

    def _begin_step(
        self, decoder: _Decoder, tokens: torch.Tensor | None, mask: torch.Tensor | None, cache: Any
    ) -> None:
        if cache.get_seq_length() == 0:
            if self._is_used_up:  # an update has learned from what was noted
                self.clear()
                self._is_used_up = False
            self._close_generation(decoder)
            decoder.cache = weakref.ref(cache)
        elif not decoder.steps and decoder.cache() is not cache:
            raise ValueError(
                f"router_replay: got a generation of {type(decoder.module).__name__} without its first step, expected "
                "one from `generate` with its cache; a model that makes its own cannot be replayed"
            )
        elif not decoder.steps:
            return  # it began with images or sound
        elif tokens is not None and len(decoder.steps[0][0]) != len(tokens):
            raise ValueError(
                f"router_replay: got {len(tokens)} rows in the midst of a generation of {len(decoder.steps[0][0])}, "
                "expected the same ones; beam search and continuous batching cannot be replayed"
            )
        if tokens is None:
            return
        decoder.is_generating = True
        decoder.steps.append((tokens, None if mask is None else mask[:, -tokens.shape[1] :]))

    def _close_generation(self, decoder: _Decoder) -> None:
        """Put what was generated into the records; until then a step costs no more than to keep its tensors."""
        if not decoder.steps:
            return
        ids = torch.cat([step[0] for step in decoder.steps], 1)
        masks = [torch.ones_like(step[0]) if step[1] is None else step[1] for step in decoder.steps]
        layout = make_layout(ids.shape, ids.device, torch.cat(masks, 1), None)
        tables = {}
        for number, chosen in decoder.chosen.items():
            if len(chosen) != len(decoder.steps):
                raise ValueError(
                    f"router_replay: got {len(chosen)} calls of {type(self.layers[number].router).__name__} in "
                    f"{len(decoder.steps)} steps of a generation, expected one in each"
                )
            num_routed = sum(len(step[0]) for step in chosen)
            if num_routed != ids.numel():
                raise ValueError(
                    f"router_replay: got {num_routed} tokens in {type(self.layers[number].router).__name__}, expected "
                    f"{ids.numel()} as in the model's input"
                )
            tables[number] = torch.cat([_encode(*step, len(ids)) for step in chosen], 1).flatten(0, 1)
        keep = layout.is_token.nonzero().squeeze(1)
        decoder.steps, decoder.chosen = [], {}
        if tables:
            hashes = prefix_hashes(ids, layout)[keep]
            decoder.records.add(hashes, {number: table[keep] for number, table in tables.items()})

    def _found_for(self, decoder: _Decoder, number: int, router: nn.Module) -> FoundTokens | None:
        """The tokens that a router is given: of the pass under way, or of one that a checkpoint runs again."""
        if decoder.found is None and self._pending[number] and router.training and torch.is_grad_enabled():
            return self._pending[number].pop()
        return decoder.found

    def _enter_router(self, decoder: _Decoder, number: int, router: nn.Module, args: tuple[Any, ...]) -> None:
        if decoder.is_generating:
            return
        is_open = decoder.found is not None
        found = self._found_for(decoder, number, router)
        table = decoder.records.experts.get(number)
        if found is None or table is None:
            return
        if is_open and found.is_recomputed:
            self._pending[number].append(found)
        mode = ReplayedChoice(self.layers[number], found, table.index_select(0, found.rows))
        self._modes[number] = mode
        mode.__enter__()

    def _leave_router(
        self, decoder: _Decoder, number: int, router: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        mode, self._modes[number] = self._modes[number], None
        if mode is not None:
            mode.__exit__(None, None, None)
            if output is not None:
                mode.check(output)
        elif decoder.is_generating:
            chosen = read_slots(output, self.layers[number].logits_place)  # not the logits, which are larger
            if chosen is None:
                raise ValueError(
                    f"router_replay: got {type(router).__name__}, expected a router that returns the experts it chose"
                )
            decoder.chosen.setdefault(number, []).append(chosen)

    def _keep_unused(self, number: int, share: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        mode = self._modes[number]
        return None if mode is None else torch.where(mode.is_found, mode.is_used, output)


def _take(decoder: _Decoder, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    tokens = tokens_of(args, kwargs)
    if tokens is not None:
        decoder.given = {**kwargs, "input_ids": tokens}


def _leave(decoder: _Decoder, model: nn.Module, args: tuple[Any, ...], output: object) -> None:
    decoder.given = None


def _encode(indices: torch.Tensor, weights: torch.Tensor, num_experts: int, num_rows: int) -> torch.Tensor:
    """[B, S, K] int16 expert numbers, of unused slots one that no expert has."""
    is_used = (indices < num_experts) & (weights != 0)
    unused = torch.full_like(indices, torch.iinfo(torch.int16).max)
    return torch.where(is_used, indices, unused).to(torch.int16).view(num_rows, -1, indices.shape[1])
