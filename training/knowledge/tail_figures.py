"""The figures of the long tail: loss and accuracy by band, what the tail lacks, and what a training changed.

With the documents d of held-out text, and in band b the bits, bytes, tokens and tokens predicted right of d,

    bits per byte = sum_d bits_db / sum_d bytes_db        accuracy = sum_d hits_db / sum_d tokens_db
    gap           = bits per byte of the rarest band - that of the most frequent
    drop          = accuracy of the rarest band / that of the most frequent - 1

Errors count documents (delta method); of a change, the same documents before and after.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from deepseek_records.statistics import ratio_with_error
from deepseek_training.knowledge.balance import BANDS
from deepseek_training.knowledge.frequency_loss import TailCounts

# The article's loss of accuracy on rare diseases.
WARNING_DROP = -0.41
# A band of fewer tokens is neither head nor tail.
LEAST_TOKENS = 100
Estimate = tuple[float, float | None]


def ratio_change(
    first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray], *, is_relative: bool = False
) -> Estimate:
    """Return second minus first, or second / first - 1, of two ratios over the same documents, with its error.

    Args:
        first: Numerators and denominators, `[documents]`.
        second: The same.
        is_relative: Which of the two.
    """
    (one, one_scaled), (other, other_scaled) = _residuals(*first), _residuals(*second)
    value = other - one
    residuals = other_scaled - one_scaled
    if is_relative:
        if one == 0:
            return float("nan"), None
        value, residuals = other / one - 1, (other_scaled - other / one * one_scaled) / one
    counted = int(((first[1] > 0) | (second[1] > 0)).sum())
    error = None if counted < 2 else float(np.sqrt(counted / (counted - 1) * np.square(residuals).sum()))
    return float(value), error


def _residuals(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, np.ndarray]:
    ratio = numerators.sum() / denominators.sum()
    return float(ratio), (numerators - ratio * denominators) / denominators.sum()


def describe_tail(counts: Mapping[str, TailCounts]) -> dict[str, Any]:
    """Return bands, gap and drop of each kind as plain values; bands without text are left out.

    Args:
        counts: From `measure_tail`.
    """
    return {kind: _describe(one) for kind, one in counts.items()}


def _describe(counts: TailCounts) -> dict[str, Any]:
    bands = {}
    for number, name in enumerate(BANDS):
        if counts.num_tokens[:, number].sum():
            bits = ratio_with_error(counts.bits[:, number].tolist(), counts.num_bytes[:, number].tolist())
            hits = ratio_with_error(counts.hits[:, number].tolist(), counts.num_tokens[:, number].tolist())
            size = int(counts.num_tokens[:, number].sum())
            bands[name] = {"bits_per_byte": list(bits), "acc": list(hits), "num_tokens": size}
    ends = head_and_tail(counts)
    if ends is None:
        return {"bands": bands}
    head, tail = ends
    gap = ratio_change(_of(counts, head, "bits"), _of(counts, tail, "bits"))
    drop = ratio_change(_of(counts, head, "hits"), _of(counts, tail, "hits"), is_relative=True)
    names = list(BANDS)
    return {"bands": bands, "head": names[head], "tail": names[tail], "gap": list(gap), "drop": list(drop)}


def head_and_tail(counts: TailCounts) -> tuple[int, int] | None:
    """Return the most frequent and the rarest band of `LEAST_TOKENS` or more, None where there are no two.

    Args:
        counts: Of a kind.
    """
    large = np.flatnonzero(counts.num_tokens.sum(0) >= LEAST_TOKENS)
    return (int(large[-1]), int(large[0])) if len(large) > 1 else None


def changes(before: Mapping[str, TailCounts], after: Mapping[str, TailCounts]) -> dict[str, dict[str, Estimate]]:
    """Return after minus before in bits per byte of each band of each kind, with its error over documents.

    Args:
        before: From `measure_tail`.
        after: Of another model, on the same text.
    """
    return {
        kind: {
            name: ratio_change(_of(one, number, "bits"), _of(after[kind], number, "bits"))
            for number, name in enumerate(BANDS)
            if one.num_tokens[:, number].sum()
        }
        for kind, one in before.items()
    }


def _of(counts: TailCounts, band: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    below = counts.num_bytes if what == "bits" else counts.num_tokens
    return getattr(counts, what)[:, band], below[:, band]


def mean_counts(several: Iterable[Mapping[str, TailCounts]]) -> dict[str, TailCounts]:
    """Return the mean over models, document by document: errors are then of the documents alone.

    Args:
        several: Of each model, on the same text.
    """
    rows = list(several)
    return {
        kind: TailCounts(
            *(
                np.mean([getattr(row[kind], field.name) for row in rows], axis=0)
                for field in dataclasses.fields(TailCounts)
            )
        )
        for kind in rows[0]
    }
