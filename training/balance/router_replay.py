"""Router replay: what experts a rollout used is noted, and the training passes over its tokens use the same.

In 16 bits generation rounds otherwise than a full forward pass, so a few tokens go to other experts, and their
log-probabilities differ by far more than rounding. `RouterReplay` notes the choices while a model generates, and
replays the selection in every later pass over the same text: the weights stay live, so routers learn, and slots that
a dynamic number of experts left unused stay unused. It serves PPO, TRL's GRPO and RLOO and any loop, for our model and
every family of `modeling_deepseek/families.py` whose router tells its choice.

A token is found by a hash of its sequence up to itself. So a pass may hold other rows, in another order, padded,
packed or cut short; what was not generated is routed live, and the share that was replayed is a figure.

Axes: T tokens, E experts, K slots per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode

from modeling_deepseek.families import MoeLayer, find_moe_layers
from modeling_deepseek.router_output import read_choice
from modeling_deepseek.token_layout import TokenLayout, make_layout

_Step = tuple[torch.Tensor, torch.Tensor | None]  # token ids [B, S] and their part of the mask
_Chosen = tuple[torch.Tensor, torch.Tensor | None, int]  # a step's experts [T, K], their weights, E


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
class _Found:
    """Where the tokens of a pass stand in the records.

    Attributes:
        rows: [T] int64; anything where `is_found` is False.
        is_found: [T] bool.
        is_recomputed: Whether activation checkpointing will run the layers again, in the backward pass.
    """

    rows: torch.Tensor
    is_found: torch.Tensor
    is_recomputed: bool


@dataclass
class _Decoder:
    """A decoder, the numbers of its MoE layers, what it generates, its records and the pass that is under way."""

    module: nn.Module
    numbers: list[int]
    steps: list[_Step] = field(default_factory=list)
    chosen: dict[int, list[_Chosen]] = field(default_factory=dict)
    records: _Records = field(default_factory=_Records)
    is_generating: bool = False
    found: _Found | None = None


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
        self.layers = find_moe_layers(model)
        if not self.layers:
            raise ValueError(f"router_replay: got {type(model).__name__} without routed experts, expected a MoE model")
        by_decoder: dict[nn.Module, list[int]] = {}
        for number, layer in enumerate(self.layers):
            by_decoder.setdefault(layer.decoder, []).append(number)
        self._decoders = [_Decoder(module, numbers) for module, numbers in by_decoder.items()]
        self._pending: list[list[_Found | None]] = [[] for _ in self.layers]
        self._modes: list[_ReplayedChoice | None] = [None] * len(self.layers)
        self._tuner = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
        self._is_used_up = False
        self._handles: list[Any] = []
        self._counts: torch.Tensor | None = None

    def attach(self) -> "RouterReplay":
        """Begin to note and to replay."""
        for decoder in self._decoders:
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
            ValueError: Another number of tokens or layers.
        """
        for decoder in self._decoders[:1]:
            expected = len(decoder.numbers)
            if experts.ndim != 3 or len(token_ids) - len(experts) not in (0, 1) or experts.shape[1] != expected:
                raise ValueError(
                    f"router_replay: got experts of shape {tuple(experts.shape)}, expected [{len(token_ids)} or "
                    f"{len(token_ids) - 1}, {expected}, K] for {len(token_ids)} tokens and {expected} MoE layers"
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

    def _begin(self, decoder: _Decoder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get("input_ids", args[0] if args else None)
        decoder.is_generating, decoder.found = False, None
        if not isinstance(tokens, torch.Tensor) or tokens.ndim != 2 or tokens.is_floating_point():
            return
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        cache = kwargs.get("past_key_values", kwargs.get("cache"))  # renamed in transformers 5.24
        if cache is not None:
            if not torch.is_grad_enabled():
                self._begin_step(decoder, tokens, mask, is_first=cache.get_seq_length() == 0)
            return
        if self._tuner is not None and self._tuner.disable_adapters:
            return  # the reference, which has a choice of its own
        self._close_generation(decoder)
        hashes = decoder.records.hashes
        if hashes is None:
            return
        layout = make_layout(tokens.shape, tokens.device, mask, kwargs.get("position_ids"))
        own = prefix_hashes(tokens, layout)
        rows = torch.searchsorted(hashes, own).clamp(max=len(hashes) - 1)
        is_recomputed = torch.is_grad_enabled() and any(
            vars(part).get("gradient_checkpointing", False) for part in module.modules()
        )
        decoder.found = _Found(rows, (hashes[rows] == own) & layout.is_token, is_recomputed)
        if torch.is_grad_enabled():
            self._is_used_up = True
            counts = torch.stack([decoder.found.is_found.sum(), layout.is_token.sum()])
            self._counts = counts if self._counts is None else self._counts + counts

    def _end(self, decoder: _Decoder, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        decoder.is_generating, decoder.found = False, None

    def _begin_step(self, decoder: _Decoder, tokens: torch.Tensor, mask: torch.Tensor | None, is_first: bool) -> None:
        if is_first:
            if self._is_used_up:  # an update has learned from what was noted
                self.clear()
                self._is_used_up = False
            self._close_generation(decoder)
        elif decoder.steps and len(decoder.steps[0][0]) != len(tokens):
            raise ValueError(
                f"router_replay: got {len(tokens)} rows in the midst of a generation of {len(decoder.steps[0][0])}, "
                "expected the same ones; beam search and continuous batching cannot be replayed"
            )
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

    def _found_for(self, decoder: _Decoder, number: int, router: nn.Module) -> _Found | None:
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
        mode = _ReplayedChoice(self.layers[number], found, table[found.rows])
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
            choice = read_choice(output, self.layers[number].logits_place)
            if choice is None or choice.topk_indices is None:
                raise ValueError(
                    f"router_replay: got {type(router).__name__}, expected a router that returns the experts it chose"
                )
            chosen = (choice.topk_indices, choice.topk_weights, choice.num_experts)  # not the logits, which are larger
            decoder.chosen.setdefault(number, []).append(chosen)

    def _keep_unused(self, number: int, share: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        mode = self._modes[number]
        return None if mode is None else torch.where(mode.is_found, mode.is_used, output)


class _ReplayedChoice(TorchFunctionMode):
    """While a router runs, its `topk` over the experts returns the noted ones, with the values that stand there now.

    A `topk` over groups of experts returns groups in which the noted ones lie.
    """

    def __init__(self, layer: MoeLayer, found: _Found, table: torch.Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.table = table.long()
        self.is_found = found.is_found.unsqueeze(1)
        self.num_calls = 0
        self.num_experts = layer.num_experts
        self.is_used = torch.ones_like(self.table, dtype=torch.bool)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") != "topk" or args[0].ndim != 2:
            return result
        scores = args[0]
        if len(scores) != len(self.table):
            raise ValueError(
                f"router_replay: got {len(scores)} tokens in {type(self.layer.router).__name__}, expected "
                f"{len(self.table)} as in the model's input"
            )
        if result[1].shape[1] == self.table.shape[1] and scores.shape[1] >= self._least_width():
            self.num_calls += 1
            noted = self._noted(scores.shape[1])
            indices = torch.where(self.is_found, noted, result[1])
            return torch.return_types.topk((scores.gather(1, indices), indices))
        if self.num_experts and self.num_experts % scores.shape[1] == 0:
            groups = self._noted(self.num_experts) // (self.num_experts // scores.shape[1])
            uses = torch.zeros_like(scores, dtype=torch.long).scatter_add_(1, groups, self.is_used.long())
            needed = (uses > 0) & self.is_found
            return func(scores.masked_fill(needed, float("inf")), *args[1:], **(kwargs or {}))
        return result

    def _least_width(self) -> int:
        return self.num_experts or self.table.shape[1]

    def _noted(self, width: int) -> torch.Tensor:
        """[T, K] expert numbers; those of unused slots are valid and no matter."""
        self.is_used = self.table < width
        return self.table.clamp(max=width - 1)

    def check(self, output: Any) -> None:
        """Refuse a router that chose without `topk`, unless it chose the same (by a table of tokens, as V4's first).

        Args:
            output: What the router returned.

        Raises:
            ValueError: It chose otherwise.
        """
        if self.num_calls == 1:
            return
        choice = read_choice(output, self.layer.logits_place)
        indices = None if choice is None else choice.topk_indices
        if self.num_calls or indices is None or not bool(((indices == self.table) | ~self.is_found).all()):
            raise ValueError(
                f"router_replay: got {type(self.layer.router).__name__} with {self.num_calls} calls of topk over its "
                "experts, expected 1; this router cannot be replayed"
            )


def prefix_hashes(token_ids: torch.Tensor, layout: TokenLayout) -> torch.Tensor:
    """Return [T] int64 hashes of each token's sequence up to itself, whatever stands around it.

    Args:
        token_ids: [B, S].
        layout: Sequences and padding.
    """
    flat, is_token = token_ids.flatten().long(), layout.is_token
    counts = is_token.long().cumsum(0)
    # The sequence's first token: its id differs from that of the last token before.
    ids = layout.sequence_ids
    last_ids = torch.where(is_token, ids, -1).cummax(0).values  # rise along the batch
    begins = is_token & (ids != torch.cat([ids.new_full((1,), -1), last_ids[:-1]]))
    offsets = counts - torch.where(begins, counts, 0).cummax(0).values
    mixed = _mix(flat + 1, offsets) * is_token
    sums = mixed.cumsum(0)
    starts = torch.where(begins, torch.arange(len(flat), device=flat.device), 0).cummax(0).values
    return sums - (sums - mixed)[starts]


def _mix(tokens: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """A pseudo-random int64 for each token and offset, by splitmix64's finish; products wrap around."""
    value = tokens * -0x61C8864680B583EB + offsets * -0x3B314601E57A13AD
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        value = (value ^ ((value >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def _encode(indices: torch.Tensor, weights: torch.Tensor | None, num_experts: int, num_rows: int) -> torch.Tensor:
    """[B, S, K] int16 expert numbers, of unused slots one that no expert has."""
    is_used = indices < num_experts
    if weights is not None:
        is_used = is_used & (weights != 0)
    unused = torch.full_like(indices, torch.iinfo(torch.int16).max)
    return torch.where(is_used, indices, unused).to(torch.int16).view(num_rows, -1, indices.shape[1])
