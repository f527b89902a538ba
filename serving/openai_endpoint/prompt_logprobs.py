"""Log-probabilities of a prompt's own tokens, for `echo` with `logprobs`.

Continuous batching keeps logits only where a token is chosen next. For the requests that ask for more, the model is
told to keep those of the whole prompt as well; they are read and taken out again before anything is chosen.
`engine.py` owns one.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from deepseek_serving.monitoring.routing_counts import Rows

# Of a token: its log-probability, and the likeliest tokens with theirs; None for the first token of a text.
TokenRecord = tuple[float, list[int], list[float]]
PromptRecord = list[TokenRecord | None]


@dataclass
class _Wanted:
    prompt_ids: list[int]
    num_top: int
    record: PromptRecord


class PromptLogprobs:
    """Reads what a model gives each token of a prompt, after the tokens before it.

    Args:
        model: The served model.
        rows_of_pass: Asked in each pass for the requests of the batch: their names and numbers of tokens, in order.
    """

    def __init__(self, model: PreTrainedModel, rows_of_pass: Callable[[], Rows]) -> None:
        self._rows_of_pass = rows_of_pass
        self._wanted: dict[str, _Wanted] = {}
        self._of_thread = threading.local()  # others may call the model too
        this = weakref.proxy(self)  # the model may outlive the server
        self._handles = [
            model.register_forward_pre_hook(lambda *call: this._begin(*call[1:]), with_kwargs=True),
            model.register_forward_hook(lambda *call: this._end(call[-1])),
        ]

    def __contains__(self, request_id: str) -> bool:
        """Whether a request's prompt is to be read token by token."""
        return request_id in self._wanted

    def begin(self, request_id: str, prompt_ids: list[int], num_top: int) -> PromptRecord:
        """Read a request's prompt from now on, and return what is filled: one entry per token.

        Args:
            request_id: Its name in `rows_of_pass`.
            prompt_ids: The prompt.
            num_top: How many of the likeliest tokens are told with each.
        """
        record: PromptRecord = [None] * len(prompt_ids)
        self._wanted[request_id] = _Wanted(prompt_ids, num_top, record)
        return record

    def end(self, request_id: str) -> None:
        """Forget a request; one that was never begun is passed over."""
        self._wanted.pop(request_id, None)

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        self._of_thread.opened = None
        if not self._wanted or "cu_seq_lens_q" not in kwargs:  # what continuous batching tells attention
            return None
        places: list[int] = []
        targets: list[tuple[_Wanted, int]] = []  # whose token, and which of the prompt
        start = 0
        for request_id, num_tokens in self._rows_of_pass():
            wanted = self._wanted.get(request_id)
            if wanted is not None:
                positions = kwargs["position_ids"][0, start : start + num_tokens].tolist()
                for place, position in enumerate(positions, start):
                    if position + 1 < len(wanted.prompt_ids):
                        places.append(place)
                        targets.append((wanted, position + 1))
            start += num_tokens
        if not places:
            return None
        kept = kwargs.get("logits_to_keep")
        self._of_thread.opened = places, targets, kept is not None
        if kept is None:
            return None
        return args, {**kwargs, "logits_to_keep": torch.cat((torch.tensor(places, device=kept.device), kept))}

    @torch.inference_mode()
    def _end(self, output: Any) -> None:
        opened = getattr(self._of_thread, "opened", None)
        if opened is None:
            return
        self._of_thread.opened = None
        places, targets, is_first = opened
        rows = output.logits[0, : len(places)] if is_first else output.logits[0, places]
        if is_first:
            output.logits = output.logits[:, len(places) :]
        logps = rows.float().log_softmax(dim=-1)
        ids = torch.tensor([wanted.prompt_ids[token] for wanted, token in targets], device=logps.device)
        chosen = logps.gather(1, ids[:, None])[:, 0].tolist()
        top = logps.topk(max(wanted.num_top for wanted, _ in targets))
        likeliest = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        for (wanted, token), logp, (top_ids, top_logps) in zip(targets, chosen, likeliest, strict=True):
            wanted.record[token] = logp, top_ids[: wanted.num_top], top_logps[: wanted.num_top]
