"""Whether attributions point at what matters: tokens are taken away, or given back, in their order and in random ones.

Taken away means the mean embedding in the token's place, and the routers choose anew. A curve's area is the mean of
the figure over all numbers of tokens; deletion by a good order has a small area, insertion a large one. The gain is
the difference to the mean over random orders, in the direction that is better, one number per text, and its
significance is by flipping signs over texts.

Axes: S tokens, B curves.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from deepseek_eval.interpret.attributions import Attribution, Reading
from deepseek_records.statistics import mean_with_error

NUM_RANDOM = 20
_POINTS = 11
_FLIPS = 10_000


@dataclass(frozen=True)
class TextCurves:
    """The curves of one text, at equal shares of its tokens.

    Attributes:
        deletion: By the attributions' order.
        deletion_random: Mean over random orders.
        insertion: By the attributions' order.
        insertion_random: Mean over random orders.
    """

    deletion: tuple[float, ...]
    deletion_random: tuple[float, ...]
    insertion: tuple[float, ...]
    insertion_random: tuple[float, ...]


@dataclass(frozen=True)
class Faithfulness:
    """Over several texts.

    Attributes:
        shares: Of tokens taken away or given back, the x of all curves.
        curves: Mean over texts, log P of the next token.
        deletion_gain: How much lower the area is than by random orders, and its standard error.
        insertion_gain: How much higher.
        deletion_p: One-sided p-value by sign flips over texts.
        insertion_p: Likewise.
        num_texts: Texts.
        most_error: Largest completeness error of their attributions.
    """

    shares: tuple[float, ...]
    curves: TextCurves
    deletion_gain: tuple[float, float | None]
    insertion_gain: tuple[float, float | None]
    deletion_p: float
    insertion_p: float
    num_texts: int
    most_error: float


@torch.no_grad()
def trace_curves(reading: Reading, attribution: Attribution, seed: int = 0) -> TextCurves:
    """Return the deletion and insertion curves of one text; the begin token stays.

    Args:
        reading: The text.
        attribution: Of its next token.
        seed: Of the random orders.
    """
    size = len(attribution.values) - 1
    rng = np.random.default_rng(seed)
    own = np.argsort(-np.array(attribution.values[1:])) + 1
    orders = [own, *(rng.permutation(size) + 1 for _ in range(NUM_RANDOM))]
    counts = np.round(np.linspace(0, size, _POINTS)).astype(int)
    curves = {}
    for is_deletion in (True, False):
        rows = [_mixed(reading, order[:count], is_deletion) for order in orders for count in counts]
        batches = torch.stack(rows).split(64)
        figures = torch.cat([reading.next_token_target(batch) for batch in batches])
        table = figures.view(len(orders), len(counts)).double().cpu().numpy()
        curves[is_deletion] = tuple(table[0].tolist()), tuple(table[1:].mean(0).tolist())
    return TextCurves(*curves[True], *curves[False])


def _mixed(reading: Reading, tokens: np.ndarray, is_deletion: bool) -> torch.Tensor:
    """[S, D] with the mean embedding at these tokens, or at all but these."""
    is_mean = torch.full((len(reading.token_ids), 1), not is_deletion, device=reading.embeddings.device)
    is_mean[torch.from_numpy(tokens)] = is_deletion
    is_mean[0] = False
    return torch.where(is_mean, reading.mean, reading.embeddings)


def sum_up(texts: Sequence[TextCurves], errors: Sequence[float], seed: int = 0) -> Faithfulness:
    """Return the mean curves, the gains over random orders and their significance.

    Args:
        texts: Of each text, from `trace_curves`.
        errors: Of each text's attributions, as `Attribution` has it.
        seed: Of the sign flips.
    """
    means = {
        name: np.array([getattr(text, name) for text in texts]).mean(0) for name in TextCurves.__dataclass_fields__
    }
    deletion = [_area(text.deletion_random) - _area(text.deletion) for text in texts]
    insertion = [_area(text.insertion) - _area(text.insertion_random) for text in texts]
    return Faithfulness(
        shares=tuple(np.linspace(0, 1, _POINTS).tolist()),
        curves=TextCurves(**{name: tuple(values.tolist()) for name, values in means.items()}),
        deletion_gain=mean_with_error(deletion),
        insertion_gain=mean_with_error(insertion),
        deletion_p=sign_flip_p(deletion, seed),
        insertion_p=sign_flip_p(insertion, seed),
        num_texts=len(texts),
        most_error=max(errors),
    )


def _area(curve: Sequence[float]) -> float:
    return float(np.trapezoid(curve) / (len(curve) - 1))


def sign_flip_p(values: Sequence[float], seed: int = 0) -> float:
    """Return how often a mean as large comes up where each value's sign is a coin's; one added to both counts.

    Args:
        values: One per text.
        seed: Randomness.
    """
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(_FLIPS, len(values)))
    means = signs @ np.array(values) / len(values)
    return (1 + int((means >= np.mean(values) - 1e-12).sum())) / (1 + _FLIPS)
