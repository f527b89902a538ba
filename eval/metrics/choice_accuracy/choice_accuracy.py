"""Accuracy over multiple-choice questions with standard errors, in all and by group and category.

Loaded offline by ``evaluate.load(<this folder>)``. The micro average's standard error over groups is the
pooled one that lm-evaluation-harness prints, so that equal predictions give equal figures.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import evaluate

from deepseek_eval.metrics.description import describe_metric
from deepseek_records.statistics import mean_with_error, pooled_mean_with_error

_CITATION = """\
@article{hendrycks2021mmlu, title={Measuring Massive Multitask Language Understanding}, author={Hendrycks et al.},
journal={ICLR}, year={2021}, note={arXiv 2009.03300}}
"""
_DESCRIPTION = "Share of questions whose predicted choice is the right one; micro, macro, by group and by category."
_INPUTS = """
Args:
    predictions: index of the chosen answer, one a question.
    references: index of the right answer, one a question.
    groups: optional, the group (MMLU: subject) of each question.
    categories: optional, a mapping from group to category.
Returns:
    acc, acc_stderr, n; with groups also macro_acc, macro_acc_stderr and groups; with categories also categories.
"""


class ChoiceAccuracy(evaluate.Metric):
    """Accuracy with standard errors and breakdowns."""

    def _info(self) -> evaluate.MetricInfo:
        return describe_metric(_DESCRIPTION, _CITATION, _INPUTS, ["https://arxiv.org/abs/2009.03300"])

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        groups: Sequence[Any] | None = None,
        categories: Any = None,
    ) -> dict[str, Any]:
        hits = [int(p == r) for p, r in zip(predictions, references, strict=True)]
        if groups is None:
            return _score(hits)
        hits_by_group = defaultdict(list)
        for group, hit in zip(groups, hits, strict=True):
            hits_by_group[group].append(hit)
        result = {**_pool(list(hits_by_group.values())), **_macro(list(hits_by_group.values()))}
        result["groups"] = {group: _score(rows) for group, rows in hits_by_group.items()}
        if categories:
            members = defaultdict(list)
            for group, rows in hits_by_group.items():
                members[categories.get(group, "other")].append(rows)
            result["categories"] = {name: {**_pool(rows), **_macro(rows)} for name, rows in sorted(members.items())}
        return result


def _score(hits: list[int]) -> dict[str, Any]:
    acc, error = mean_with_error(hits)
    return {"acc": acc, "acc_stderr": error, "n": len(hits)}


def _pool(groups: list[list[int]]) -> dict[str, Any]:
    """Micro average; its error pools the groups' variances."""
    acc, error = pooled_mean_with_error(groups)
    return {"acc": acc, "acc_stderr": error, "n": sum(map(len, groups))}


def _macro(groups: list[list[int]]) -> dict[str, Any]:
    """Mean of the groups' accuracies; None as error when a group has a single question."""
    scores = [_score(rows) for rows in groups]
    macro = {"macro_acc": sum(score["acc"] for score in scores) / len(scores), "macro_acc_stderr": None}
    if all(score["acc_stderr"] is not None for score in scores):
        macro["macro_acc_stderr"] = math.sqrt(sum(score["acc_stderr"] ** 2 for score in scores)) / len(scores)
    return macro
