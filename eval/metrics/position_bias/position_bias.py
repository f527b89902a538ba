"""Whether a model prefers some answer letters, whatever stands behind them.

Loaded offline by ``evaluate.load(<this folder>)``; takes letters predicted anywhere.

    recall(l) = share of the questions with gold letter l that are answered l
    rstd      = standard deviation of the recalls over the letters, divided by their number, not one less
    chi2      = sum_l (predicted_l - gold_l)^2 / gold_l, in counts, one degree of freedom less than letters

A model without preference has equal recalls, hence rstd 0, however many questions it gets wrong. Surprising: chance
alone makes rstd positive, so it is shown with ``rstd_stderr`` (bootstrap over questions) and ``rstd_by_chance``, what
a model of the same accuracy without any preference would get on average.

Reference: Zheng et al., 2023, "Large Language Models Are Not Robust Multiple Choice Selectors", arXiv 2309.03882.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np

from deepseek_eval.metrics.description import describe_metric
from deepseek_records.statistics import chi_square_p

_CITATION = """\
@inproceedings{zheng2023selectors, title={Large Language Models Are Not Robust Multiple Choice Selectors},
author={Zheng et al.}, booktitle={ICLR}, year={2024}, note={arXiv 2309.03882}}
"""
_DESCRIPTION = "Preference for answer letters: their shares, a chi-square test, and the spread of recalls (RStd)."
_INPUTS = """
Args:
    predictions: index of the letter chosen, one a question.
    references: index of the right letter.
    num_letters: how many letters there are.
    clusters: optional, the question each answer belongs to, where one is asked in several orders.
    seed: seed of the bootstrap.
Returns:
    rstd, rstd_stderr, rstd_by_chance, chi2, chi2_p (None with clusters: no independent draws), n, letters.
"""
NUM_RESAMPLES = 500


class PositionBias(evaluate.Metric):
    """Preference for answer letters."""

    def _info(self) -> evaluate.MetricInfo:
        return describe_metric(
            _DESCRIPTION,
            _CITATION,
            _INPUTS,
            ["https://arxiv.org/abs/2309.03882", "https://github.com/chujiezheng/LLM-MCQ-Bias"],
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        num_letters: int = 4,
        clusters: Sequence[Any] | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        return measure_position_bias(predictions, references, num_letters=num_letters, clusters=clusters, seed=seed)


def measure_position_bias(
    predictions: Sequence[int],
    references: Sequence[int],
    *,
    num_letters: int = 4,
    clusters: Sequence[Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return what the metric returns, for metrics that include it.

    Args:
        predictions: As the metric's.
        references: As the metric's.
        num_letters: As the metric's.
        clusters: As the metric's.
        seed: As the metric's.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    n = len(predictions)
    chosen = np.bincount(predictions, minlength=num_letters)
    gold = np.bincount(references, minlength=num_letters)
    hits = predictions == references
    recalls = [float(hits[references == letter].mean()) if gold[letter] else None for letter in range(num_letters)]
    chi2 = float(sum((chosen - gold) ** 2 / np.maximum(gold, 1))) if gold.all() and clusters is None else None
    generator = np.random.default_rng(seed)
    return {
        "rstd": _rstd(recalls),
        "rstd_stderr": _bootstrap_error(hits, references, num_letters, clusters, generator),
        "rstd_by_chance": _rstd_without_preference(float(hits.mean()), gold, generator),
        "chi2": chi2,
        "chi2_p": None if chi2 is None else chi_square_p(chi2, num_letters - 1),
        "n": n,
        "letters": {
            "ABCDEFGHIJ"[letter]: {
                "predicted": float(chosen[letter] / n),
                "gold": float(gold[letter] / n),
                "recall": recalls[letter],
            }
            for letter in range(num_letters)
        },
    }


def _rstd(recalls: list[float | None]) -> float:
    return float(np.std([recall for recall in recalls if recall is not None]))


def _bootstrap_error(
    hits: np.ndarray,
    references: np.ndarray,
    num_letters: int,
    clusters: Sequence[Any] | None,
    generator: np.random.Generator,
) -> float | None:
    """Spread of rstd over resampled questions; a question's orders are drawn together."""
    names = list(range(len(hits))) if clusters is None else list(clusters)
    index = {name: position for position, name in enumerate(Counter(names))}
    if len(index) < 2:
        return None
    # Hits and questions by cluster and letter; a resample weighs the clusters.
    members = np.array([index[name] for name in names])
    right = np.zeros((len(index), num_letters))
    asked = np.zeros((len(index), num_letters))
    np.add.at(right, (members, references), hits)
    np.add.at(asked, (members, references), 1)
    values = []
    for _ in range(NUM_RESAMPLES):
        weights = np.bincount(generator.integers(len(index), size=len(index)), minlength=len(index))
        total = weights @ asked
        values.append(np.std((weights @ right)[total > 0] / total[total > 0]))
    return float(np.std(values, ddof=1))


def _rstd_without_preference(accuracy: float, gold: np.ndarray, generator: np.random.Generator) -> float:
    """Mean rstd of a model that is right with one probability, whatever the letter."""
    counts = gold[gold > 0]
    recalls = generator.binomial(counts, accuracy, size=(NUM_RESAMPLES, len(counts))) / counts
    return float(np.std(recalls, axis=1).mean())
