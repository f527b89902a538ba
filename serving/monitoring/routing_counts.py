"""What the routers of a served model choose: per layer for /metrics, per request for drift.

`openai_endpoint/engine.py` owns one where `deepseek-moe serve` counts. The routers' outputs are only collected while
the model runs; every few passes they are counted together, so that a step of a small model does not pay for many small
operations. Padding does not occur in continuous batching, the engine's first trial token comes before the hooks, and
tokens that a request shares with the cached beginning of another pass no router: they are not counted.

Axes: T tokens, E experts, K experts per token.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_deepseek.families import find_moe_layers
from modeling_deepseek.router_output import RouterChoice, read_choice

# Passes or logits of all layers that are collected before they are counted.
_MAX_PASSES = 64
_MAX_LOGITS = 4_000_000

Rows = list[tuple[str, int]]


@dataclass
class LayerTotals:
    """What one layer's router chose since the server's start.

    Attributes:
        name: The layer's.
        tokens_per_expert: `[E]` int64.
        num_tokens: Tokens that passed the router.
        entropy: Of the softmax over all experts' logits, in nats, summed over tokens.
    """

    name: str
    tokens_per_expert: np.ndarray
    num_tokens: int = 0
    entropy: float = 0.0


@dataclass
class RequestCounts:
    """What one request left behind.

    Attributes:
        expert_tokens: `[sum of E]` int64, one layer behind the other.
        log_prob: Of the tokens that were written, by the model alone (temperature 1), summed.
        num_written: Those tokens.
    """

    expert_tokens: np.ndarray
    log_prob: float = 0.0
    num_written: int = 0


Take = Callable[[RequestCounts], None]


@dataclass
class _Pass:
    rows: Rows
    outputs: dict[int, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(number for _, number in self.rows)


@dataclass
class _Seen:
    """One router's output in one pass: layer, rows of its tokens, choice."""

    number: int
    rows: np.ndarray
    choice: RouterChoice


class RoutingCounts:
    """Hooks a model's routers and counts their choices.

    Args:
        model: The served model.
        rows_of_pass: Asked in each pass for the requests of the batch: their names and numbers of tokens, in order.

    Attributes:
        on_pass: Told the number of requests and of tokens of each pass, when it is counted.
        layers: The layers whose number of experts is known, in order.
        totals: One per layer.
        num_passes: Passes that were counted.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows_of_pass: Callable[[], Rows],
    ) -> None:
        self.layers = [layer for layer in find_moe_layers(model) if layer.num_experts is not None]
        self.totals = [LayerTotals(layer.name, np.zeros(layer.num_experts or 0, np.int64)) for layer in self.layers]
        self.num_passes = 0
        self._rows_of_pass = rows_of_pass
        self.on_pass: Callable[[int, int], None] = lambda requests, tokens: None
        self._counting, self._swap = threading.Lock(), threading.Lock()
        self._of_thread = threading.local()  # others may call the model too; only the server's passes count
        self._passes: list[_Pass] = []
        self._num_collected = 0
        self._log_probs: list[tuple[list[str], torch.Tensor]] = []
        self._ended: list[tuple[str, Take | None]] = []
        self._by_request: dict[str, RequestCounts] = {}
        self._model = model
        self._handles: list[Any] = []
        self.attach()

    def attach(self) -> None:
        """Begin to count."""
        this = weakref.proxy(self)  # the model may outlive the server
        self._handles = [
            self._model.register_forward_pre_hook(lambda *call: this._begin(call[-1]), with_kwargs=True),
            self._model.register_forward_hook(lambda *_: this._end()),
            *(layer.router.register_forward_hook(_hand_to(this, number)) for number, layer in enumerate(self.layers)),
        ]

    @property
    def names(self) -> list[str]:
        """The layers' names."""
        return [totals.name for totals in self.totals]

    @property
    def sizes(self) -> list[int]:
        """E of each layer; a request's counts stand one layer behind the other."""
        return [len(totals.tokens_per_expert) for totals in self.totals]

    def begin(self, request_id: str) -> None:
        """Count a request by itself from now on.

        Args:
            request_id: Its name in `rows_of_pass`.
        """
        self._by_request[request_id] = RequestCounts(np.zeros(sum(self.sizes), np.int64))

    def end(self, request_id: str, take: Take | None) -> None:
        """Forget a request when its last pass has been counted.

        Args:
            request_id: From `begin`.
            take: Called with its counts; None where they are of no use.
        """
        with self._swap:
            self._ended.append((request_id, take))

    def write(self, request_ids: list[str], log_probs: torch.Tensor) -> None:
        """Note what was written in a pass.

        Args:
            request_ids: In the order of the rows.
            log_probs: `[rows]`, of the chosen tokens.
        """
        with self._swap:
            self._log_probs.append((request_ids, log_probs))

    def detach(self) -> None:
        """Remove every hook; `attach` goes on."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def flush(self) -> None:
        """Count what was collected."""
        with self._counting:
            with self._swap:
                passes, self._passes, self._num_collected = self._passes, [], 0
                ended, self._ended = self._ended, []
                log_probs, self._log_probs = self._log_probs, []
            if passes:
                self._count(passes)
            self._add_log_probs(log_probs)
            for request_id, take in ended:
                counts = self._by_request.pop(request_id)
                if take is not None:
                    take(counts)

    def _begin(self, kwargs: dict[str, Any]) -> None:
        is_batched = "cu_seq_lens_q" in kwargs  # what continuous batching tells attention
        self._of_thread.opened = _Pass(self._rows_of_pass()) if is_batched else None

    def _see(self, number: int, output: Any) -> None:
        opened = getattr(self._of_thread, "opened", None)
        if opened is not None:
            opened.outputs[number] = output

    def _end(self) -> None:
        opened, self._of_thread.opened = getattr(self._of_thread, "opened", None), None
        if opened is None:
            return
        with self._swap:
            self._passes.append(opened)
            self._num_collected += opened.num_tokens
            is_full = len(self._passes) >= _MAX_PASSES or self._num_collected * sum(self.sizes) >= _MAX_LOGITS
        if is_full:
            self.flush()

    @torch.inference_mode()
    def _count(self, passes: list[_Pass]) -> None:
        self.num_passes += len(passes)
        for one in passes:
            self.on_pass(len(one.rows), one.num_tokens)
        names = list(dict.fromkeys(name for one in passes for name, _ in one.rows))
        row_of = {name: number for number, name in enumerate(names)}
        rows_of_pass: list[np.ndarray] = [
            np.repeat([row_of[name] for name, _ in one.rows], [size for _, size in one.rows]) for one in passes
        ]
        seen: dict[tuple[int, str], list[_Seen]] = {}
        for number, layer in enumerate(self.layers):
            told = [place for place, one in enumerate(passes) if number in one.outputs]  # else it broke off
            outputs = [passes[place].outputs[number] for place in told]
            for output, rows in _join(outputs, [rows_of_pass[place] for place in told]):
                choice = read_choice(output, layer.logits_place)
                if choice is not None:
                    key = len(self.totals[number].tokens_per_expert), _kind_of(choice)
                    seen.setdefault(key, []).append(_Seen(number, rows, choice))
        loads: list[np.ndarray] = [np.zeros((len(names), size), np.int64) for size in self.sizes]
        for (_, kind), group in seen.items():
            self._count_group(kind, group, loads)
        for totals, of_layer in zip(self.totals, loads, strict=True):
            totals.tokens_per_expert += of_layer.sum(0)
        if loads:
            for name, counts in zip(names, np.concatenate(loads, axis=1), strict=True):
                if name in self._by_request:  # a request that was ended early may still be in the batch
                    self._by_request[name].expert_tokens += counts

    def _count_group(self, kind: str, group: list[_Seen], loads: list[np.ndarray]) -> None:
        """Count the outputs of routers of one kind and size together."""
        layer_of_token: np.ndarray = np.repeat([one.number for one in group], [len(one.rows) for one in group])
        entropies = RouterChoice(torch.cat([one.choice.router_logits for one in group])).entropies().cpu().numpy()
        entropy = np.bincount(layer_of_token, entropies, minlength=len(self.totals))
        num_tokens = np.bincount(layer_of_token, minlength=len(self.totals))
        for totals, nats, tokens in zip(self.totals, entropy.tolist(), num_tokens.tolist(), strict=True):
            totals.entropy += nats
            totals.num_tokens += tokens
        if kind == "load":  # not told by token: kept in the sums under the first request
            for one in group:
                assert one.choice.load is not None
                loads[one.number][0] += one.choice.load.cpu().numpy()
            return
        token, expert = (_chosen_by_table if kind == "table" else _chosen_by_index)([one.choice for one in group])
        num_rows, num_experts = loads[group[0].number].shape
        row_of_token = layer_of_token * num_rows + np.concatenate([one.rows for one in group])
        flat = np.bincount(row_of_token[token] * num_experts + expert, minlength=len(loads) * num_rows * num_experts)
        counted = flat.reshape(len(loads), num_rows, num_experts)
        for number in {one.number for one in group}:
            loads[number] += counted[number]

    def _add_log_probs(self, found: list[tuple[list[str], torch.Tensor]]) -> None:
        if not found:
            return
        names = [name for request_ids, _ in found for name in request_ids]
        for name, log_prob in zip(names, torch.cat([log_probs for _, log_probs in found]).tolist(), strict=True):
            if name in self._by_request:
                self._by_request[name].log_prob += log_prob
                self._by_request[name].num_written += 1


def _hand_to(this: Any, number: int) -> Callable[[nn.Module, Any, Any], None]:
    return lambda module, inputs, output: this._see(number, output)


def _join(outputs: list[Any], rows: list[np.ndarray]) -> list[tuple[Any, np.ndarray]]:
    """One layer's outputs with their tokens' rows: as one, where they are tuples of tables `[T, ...]`."""
    if not outputs:
        return []
    if not all(_is_of_tables(output, len(of_tokens)) for output, of_tokens in zip(outputs, rows, strict=True)):
        return list(zip(outputs, rows, strict=True))
    return [(tuple(torch.cat(parts) for parts in zip(*outputs, strict=True)), np.concatenate(rows))]


def _is_of_tables(output: Any, num_tokens: int) -> bool:
    return isinstance(output, tuple) and all(
        isinstance(part, torch.Tensor) and part.ndim == 2 and len(part) == num_tokens for part in output
    )


def _kind_of(choice: RouterChoice) -> str:
    if choice.load is not None:
        return "load"
    return "index" if choice.is_chosen is None else "table"


def _chosen_by_table(choices: list[RouterChoice]) -> tuple[np.ndarray, np.ndarray]:
    """Places of tokens and, in their order, the experts chosen."""
    token, expert = torch.cat([one.is_chosen for one in choices if one.is_chosen is not None]).cpu().numpy().nonzero()
    return token, expert


def _chosen_by_index(choices: list[RouterChoice]) -> tuple[np.ndarray, np.ndarray]:
    indices = torch.cat([one.topk_indices for one in choices if one.topk_indices is not None]).cpu().numpy()
    weights = torch.cat([one.topk_weights for one in choices if one.topk_weights is not None]).cpu()
    token, slot = ((weights != 0).numpy() & (indices < choices[0].num_experts)).nonzero()
    return token, indices[token, slot]
