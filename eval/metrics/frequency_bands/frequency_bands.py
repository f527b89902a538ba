"""Accuracy by how common a question's terms are, from the long tail to the head.

Loaded offline by ``evaluate.load(<this folder>)``. Questions are ranked by frequency and cut into bands of equal size;

    drop = accuracy(most common band) - accuracy(rarest band)

with the error of two independent shares. Rare terms and hard subjects go together, so with groups given
the ranking is repeated inside each group (``drop_within_groups``), where the subject is the same in head and tail.

Reference: Kandpal et al., 2023, "Large Language Models Struggle to Learn Long-Tail Knowledge", arXiv 2211.08411. There
a question's frequency is the number of pretraining documents that hold its entities; what is counted here is up to the
caller.
"""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import evaluate

from deepseek_eval.metrics.description import describe_metric
from deepseek_records.statistics import difference_with_error, mean_with_error

_CITATION = """\
@inproceedings{kandpal2023longtail, title={Large Language Models Struggle to Learn Long-Tail Knowledge},
author={Kandpal et al.}, booktitle={ICML}, year={2023}, note={arXiv 2211.08411}}
"""
_DESCRIPTION = "Accuracy by frequency band and the drop from head to tail."
_INPUTS = """
Args:
    predictions: index of the chosen answer.
    references: index of the right one.
    frequencies: how common each question's terms are, on any increasing scale; None leaves the question out.
    groups: optional, the subject of each question.
    num_bands: how many bands of equal size.
Returns:
    acc, acc_head, acc_tail, drop with _stderr and _n, n, num_without_frequency, bands from tail to head; with groups
    also drop_within_groups.
"""


class FrequencyBands(evaluate.Metric):
    """Accuracy by frequency band."""

    def _info(self) -> evaluate.MetricInfo:
        return describe_metric(_DESCRIPTION, _CITATION, _INPUTS, ["https://arxiv.org/abs/2211.08411"])

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        frequencies: Sequence[float | None] | None = None,
        groups: Sequence[Any] | None = None,
        num_bands: int = 5,
    ) -> dict[str, Any]:
        if frequencies is None:
            raise ValueError("frequency_bands: expected frequencies beside the predictions")
        names = groups if groups is not None else [None] * len(predictions)
        rows = [
            (frequency, float(prediction == reference), name)
            for prediction, reference, frequency, name in zip(predictions, references, frequencies, names, strict=True)
            if frequency is not None
        ]
        if len(rows) < num_bands:
            raise ValueError(f"frequency_bands: {len(rows)} questions with a frequency, expected at least {num_bands}")
        bands = _cut(rows, num_bands)
        result = {"n": len(rows), "num_without_frequency": len(predictions) - len(rows)}
        result |= _named("acc", mean_with_error([row[1] for row in rows]))
        tail, head = (mean_with_error([row[1] for row in band]) for band in (bands[0], bands[-1]))
        result |= (
            _named("acc_head", head) | _named("acc_tail", tail) | _named("drop", difference_with_error(head, tail))
        )
        sizes = {"acc_head_n": len(bands[-1]), "acc_tail_n": len(bands[0])}
        result |= sizes | {"drop_n": sum(sizes.values())}
        result["bands"] = [
            {"lowest": band[0][0], "highest": band[-1][0], "n": len(band)}
            | _named("acc", mean_with_error([row[1] for row in band]))
            for band in bands
        ]
        return result if groups is None else result | _within(rows, num_bands)


def _cut(rows: list[tuple[Any, ...]], num_bands: int) -> list[list[tuple[Any, ...]]]:
    """Bands of equal size up to one, the rarest first; equal frequencies keep their order."""
    ordered = sorted(rows, key=lambda row: row[0])
    edges = [round(index * len(ordered) / num_bands) for index in range(num_bands + 1)]
    return [ordered[start:end] for start, end in itertools.pairwise(edges)]


def _within(rows: list[tuple[Any, ...]], num_bands: int) -> dict[str, Any]:
    """The drop with head and tail taken from each group; groups smaller than the number of bands are left out."""
    members = defaultdict(list)
    for row in rows:
        members[row[2]].append(row)
    cuts = [_cut(group, num_bands) for group in members.values() if len(group) >= num_bands]
    if not cuts:
        return {"drop_within_groups": None, "drop_within_groups_stderr": None}
    # Equally many from head and tail of each group, so that no subject weighs more in one than in the other.
    tail = [row[1] for cut in cuts for row in cut[0][: len(cut[-1])]]
    head = [row[1] for cut in cuts for row in cut[-1][-len(cut[0]) :]]
    drop = difference_with_error(mean_with_error(head), mean_with_error(tail))
    return _named("drop_within_groups", drop) | {"drop_within_groups_n": len(head) + len(tail)}


def _named(name: str, figure: tuple[Any, ...]) -> dict[str, Any]:
    return {name: figure[0], f"{name}_stderr": figure[1]}
