"""How far a window of requests is from the reference, and whether chance explains it.

Every distribution (experts of each layer, tokens, log-probability, lengths) is a count vector per request, summed over
a window. KL(window || reference) in nats is taken on counts with 0.5 added to each. The tokens of one text belong
together, so the null is drawn by whole requests: of the reference, as many as the window has are set against the rest.
From that null come the corrected figure (raw less the null's mean) and the p-value.

Axes: N requests, K outcomes of a distribution.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from deepseek_serving.monitoring.request_counts import RequestTable

ALARM_NATS = 0.15
WARNING_P = 0.001
# Where the null reaches half the alarm by chance, neither alarm nor silence would say anything.
NO_VERDICT_NATS = ALARM_NATS / 2
NUM_DRAWS = 1000
_SMOOTHING = 0.5
_DECILES = np.linspace(0.1, 0.9, 9)


@dataclass(frozen=True)
class Distribution:
    """One kind of outcome.

    Attributes:
        name: `experts`, `tokens`, `log_prob`, `prompt_length` or `answer_length`.
        layer: Of experts the layer's name; else empty.
        count: Returns a table's counts `[N, K]`.
    """

    name: str
    layer: str
    count: Callable[[RequestTable], np.ndarray]


@dataclass(frozen=True)
class Finding:
    """One distribution of a window.

    Attributes:
        distribution: Its name.
        layer: Its layer, or empty.
        raw: KL(window || reference) in nats.
        corrected: Less the null's mean; None where there is no verdict.
        null_mean: Of the null.
        null_high: Its 99.9 % quantile.
        p: Share of the null that is as far or farther.
        p_holm: After Holm, over all distributions.
        moved: Outcomes that moved most: number, share in the reference, share now.
    """

    distribution: str
    layer: str
    raw: float
    corrected: float | None
    null_mean: float
    null_high: float
    p: float
    p_holm: float
    moved: list[tuple[int, float, float]]

    @property
    def is_alarm(self) -> bool:
        """The article's alarm."""
        return self.corrected is not None and self.corrected > ALARM_NATS

    @property
    def is_significant(self) -> bool:
        """Half of a warning: two checks in a row make one."""
        return self.p_holm < WARNING_P


def kl_nats(window: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return KL(window || reference) in nats of counts, 0.5 added to each.

    Args:
        window: `[..., K]`.
        reference: `[..., K]`.
    """
    p = window + _SMOOTHING
    q = reference + _SMOOTHING
    p = p / p.sum(-1, keepdims=True)
    q = q / q.sum(-1, keepdims=True)
    return (p * np.log(p / q)).sum(-1)


def find_distributions(reference: RequestTable) -> list[Distribution]:
    """Return every distribution; the bins of continuous ones are the reference's deciles.

    Args:
        reference: The table of the reference.
    """
    ends = np.cumsum(reference.sizes)
    found = [
        Distribution("experts", name, _columns(int(end) - size, int(end)))
        for name, end, size in zip(reference.layers, ends, reference.sizes, strict=True)
    ]
    log_prob = np.quantile(reference.log_prob, _DECILES)
    prompt = np.quantile(reference.prompt_tokens, _DECILES)
    answer = np.quantile(reference.written_tokens, _DECILES)
    return [
        *found,
        Distribution("tokens", "", lambda table: table.token_bins),
        Distribution("log_prob", "", lambda table: _one_hot(np.digitize(table.log_prob, log_prob), 10)),
        Distribution("prompt_length", "", lambda table: _one_hot(np.digitize(table.prompt_tokens, prompt), 10)),
        # An answer that the limit cut could have been longer: a bin of its own.
        Distribution(
            "answer_length",
            "",
            lambda table: _one_hot(np.where(table.is_cut, 10, np.digitize(table.written_tokens, answer)), 11),
        ),
    ]


class DriftCheck:
    """Checks windows of one size against a reference; the null is drawn once.

    Args:
        reference: Its table.
        num_requests: N of each window, at most half of the reference's.
        seed: Of the null's draws.
        num_draws: Of the null.
    """

    def __init__(
        self, reference: RequestTable, num_requests: int, *, seed: int = 0, num_draws: int = NUM_DRAWS
    ) -> None:
        if not 1 <= num_requests <= len(reference) // 2:
            raise ValueError(f"window: got {num_requests} requests, expected 1 to {len(reference) // 2}")
        self.num_requests = num_requests
        self.distributions = find_distributions(reference)
        generator = np.random.default_rng(seed)
        is_drawn: np.ndarray = np.zeros((num_draws, len(reference)), np.float32)
        for row in is_drawn:
            row[generator.permutation(len(reference))[:num_requests]] = 1
        self.totals, self.nulls = [], []
        for distribution in self.distributions:
            # Whole numbers: exact up to 2**24.
            counts: np.ndarray = distribution.count(reference).astype(np.float32)
            total = counts.sum(0, dtype=np.float64)
            window = (torch.from_numpy(is_drawn) @ torch.from_numpy(counts)).double().numpy()
            # What half a count adds depends on the size: the whole reference is taken as large as the rest is.
            self.totals.append(total * (1 - num_requests / len(reference)))
            self.nulls.append(np.sort(kl_nats(window, total - window)))

    def check(self, window: RequestTable) -> list[Finding]:
        """Return what was found, one per distribution.

        Args:
            window: As many requests as this was made for.
        """
        live = [distribution.count(window).sum(0, dtype=np.float64) for distribution in self.distributions]
        raw = [float(kl_nats(now, before)) for now, before in zip(live, self.totals, strict=True)]
        p = [p_value(value, null) for value, null in zip(raw, self.nulls, strict=True)]
        found = []
        rows = zip(self.distributions, raw, self.nulls, p, holm(p), live, self.totals, strict=True)
        for distribution, value, null, alone, adjusted, now, before in rows:
            high = float(np.quantile(null, 0.999))
            corrected = value - float(null.mean())
            found.append(
                Finding(
                    distribution.name,
                    distribution.layer,
                    value,
                    None if high > NO_VERDICT_NATS else corrected,
                    float(null.mean()),
                    high,
                    alone,
                    adjusted,
                    _most_moved(now, before),
                )
            )
        return found


def p_value(value: float, null: np.ndarray) -> float:
    """Return the share of a null that is as far or farther.

    Below ten of its draws the tail of the shifted gamma distribution with the null's mean, variance and skewness
    continues it: a KL between counts of dependent tokens is about a weighted sum of chi-squares (approximated by three
    moments as Pearson did; Imhof, 1961). The skewness is taken larger by the error of its estimate.

    Args:
        value: What was measured.
        null: Sorted draws.
    """
    num_beyond = len(null) - int(np.searchsorted(null, value))
    if num_beyond >= 10:
        return (num_beyond + 1) / (len(null) + 1)
    mean, deviation = float(null.mean()), float(null.std())
    if deviation == 0:
        return 1.0 if value <= mean else 1 / (len(null) + 1)
    standard = (null - mean) / deviation
    skewness = max(0.0, float((standard**3).mean())) + math.sqrt(6 / len(null))
    shape = 4 / skewness**2
    place = torch.tensor(shape + (value - mean) / deviation * math.sqrt(shape), dtype=torch.float64)
    return float(torch.special.gammaincc(torch.tensor(shape, dtype=torch.float64), place))


def holm(p_values: list[float]) -> list[float]:
    """Return p-values adjusted by Holm's method.

    Args:
        p_values: One per distribution.
    """
    adjusted = [0.0] * len(p_values)
    least = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def _columns(begin: int, end: int) -> Callable[[RequestTable], np.ndarray]:
    return lambda table: table.expert_tokens[:, begin:end]


def _one_hot(places: np.ndarray, size: int) -> np.ndarray:
    return np.eye(size, dtype=np.int64)[places]


def _most_moved(now: np.ndarray, before: np.ndarray, number: int = 5) -> list[tuple[int, float, float]]:
    shares = now / max(1.0, now.sum()), before / max(1.0, before.sum())
    places = np.argsort(-np.abs(shares[0] - shares[1]))[:number]
    return [(int(place), float(shares[1][place]), float(shares[0][place])) for place in places]
