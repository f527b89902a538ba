"""Each request's own sampling inside one batch: temperature, nucleus and seed.

transformers' processors for continuous batching know no seed, draw a greedy request's ties at random and are left out
where the defaults are neutral. This one chooses the token itself, so that greedy is `argmax` and a seed gives one text
whatever else is in the batch.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor


@dataclass(frozen=True)
class SamplingSettings:
    """How the tokens of one request are chosen.

    Attributes:
        seed: Two requests with the same seed, prompt and settings get the same random numbers.
        temperature: 0 always takes the likeliest token.
        top_p: Share of probability to sample from, above 0 and at most 1.
        num_top: How many of the likeliest tokens are recorded beside the chosen one.
        record: Gets each chosen token's log-probability, and the likeliest tokens with theirs, by the model alone;
            None records nothing.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    num_top: int = 0
    record: list[tuple[float, list[int], list[float]]] | None = field(default=None, compare=False)


class RequestSampler(ContinuousBatchingLogitsProcessor):
    """Leaves to each row of logits only the token that its request's settings choose.

    Attributes:
        on_written: Told the requests' names and the chosen tokens' log-probabilities `[rows]`, by the model alone.
    """

    supported_kwargs = {"sampling": SamplingSettings}  # noqa: RUF012
    ignored_kwargs = ()

    def __init__(self) -> None:
        self.on_written: Callable[[list[str], torch.Tensor], None] | None = None
        self._rows: list[tuple[SamplingSettings, int]] = []
        self._request_ids: list[str] = []

    def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
        """Clear the batch's arguments; the settings do not travel in them."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> torch.Tensor:
        """Note whose rows come next.

        Args:
            requests_with_new_token: In the order of the rows.

        Returns:
            `[rows]` int32 of nothing.
        """
        states = [request.state for request in requests_with_new_token]
        self._request_ids = [state.request_id for state in states]
        self._rows = [
            (state.logit_processor_kwargs["sampling"], len(state.initial_tokens) + len(state.generated_tokens))
            for state in states
        ]
        return torch.zeros(len(states), dtype=torch.int32)

    def __call__(self, scores: torch.Tensor, tensor_arg: torch.Tensor) -> torch.Tensor:
        """Return 0 for the chosen token of each row and -inf for the others.

        Args:
            scores: Logits `[rows, V]`.
            tensor_arg: Not read.
        """
        chosen = scores.argmax(dim=-1)
        drawn = [row for row, (settings, _) in enumerate(self._rows) if settings.temperature > 0]
        if drawn:
            chosen[drawn] = self._draw(scores[drawn], [self._rows[row] for row in drawn])
        for row, (settings, _) in enumerate(self._rows):
            if settings.record is not None:
                logps = scores[row].float().log_softmax(dim=-1)
                top = logps.topk(settings.num_top)
                settings.record.append((float(logps[chosen[row]]), top.indices.tolist(), top.values.tolist()))
        if self.on_written is not None:
            num_rows = len(self._request_ids)  # rows behind them are filled up
            logits, of_rows = scores[:num_rows], chosen[:num_rows, None]
            self.on_written(self._request_ids, logits.gather(-1, of_rows)[:, 0] - logits.logsumexp(dim=-1))
        return torch.full_like(scores, -torch.inf).scatter_(-1, chosen[:, None], 0.0)

    def _draw(self, logits: torch.Tensor, rows: list[tuple[SamplingSettings, int]]) -> torch.Tensor:
        """One token per row of `[rows, V]`, by the inverse of its cumulative distribution."""

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64, device=logits.device)[:, None]

        temperature = column([settings.temperature for settings, _ in rows])
        top_p = column([settings.top_p for settings, _ in rows])
        # By the seed and the place in the text alone: a request that was evicted and read again goes on as before.
        uniform = column([random.Random(f"{settings.seed} {place}").random() for settings, place in rows])
        scaled = (logits - logits.amax(dim=-1, keepdim=True)).double() / temperature
        probabilities, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True)
        before = probabilities.cumsum(dim=-1) - probabilities
        kept = torch.where(before < top_p, probabilities, 0.0)
        cumulative = kept.cumsum(dim=-1)
        place = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
        place = place.minimum((kept > 0).sum(dim=-1, keepdim=True) - 1)
        return order.gather(-1, place).squeeze(-1)
