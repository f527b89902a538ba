"""Share of right answers about images and sounds, beside the same questions asked blind and with others' media.

Loaded offline by ``evaluate.load(<this folder>)``. What a model gets right without looking is not seen: the answer may
be guessed from the question. So each question is asked three times, and the differences are paired.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import evaluate

from deepseek_eval.metrics.description import TEXT, describe_metric
from deepseek_records.statistics import mean_with_error

_CITATION = """\
@inproceedings{goyal2017making, title={Making the V in VQA Matter}, author={Goyal et al.}, booktitle={CVPR},
year={2017}, note={arXiv 1612.00837}}
"""
_DESCRIPTION = "Share of right answers about images and sounds, paired with blind and exchanged ones."
_INPUTS = """
Args:
    predictions: the model's answers.
    references: the right ones.
    blind: its answers to the same questions without image or sound.
    exchanged: its answers with the images and sounds of other questions.
    groups: optional, what kind each question is of.
Returns:
    acc, acc_blind, acc_exchanged and acc_commonest (always the commonest right answer of the group), gain_over_blind,
    gain_over_exchanged and gain_over_commonest, each with _stderr, n; with groups the same of each group; and samples:
    the four of each question.
"""
_CONDITIONS = ("acc", "acc_blind", "acc_exchanged")
_OTHERS = ("blind", "exchanged", "commonest")


class MediaAccuracy(evaluate.Metric):
    """Accuracy with its controls."""

    def _info(self) -> evaluate.MetricInfo:
        return describe_metric(
            _DESCRIPTION,
            _CITATION,
            _INPUTS,
            ["https://arxiv.org/abs/1612.00837"],
            predictions=TEXT,
            references=TEXT,
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        blind: Sequence[Any],
        exchanged: Sequence[Any],
        groups: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        samples = [
            {name: int(is_right(text, reference)) for name, text in zip(_CONDITIONS, texts, strict=True)}
            for *texts, reference in zip(predictions, blind, exchanged, references, strict=True)
        ]
        commonest = _commonest(references, groups or [""] * len(references))
        for sample, answer, reference in zip(samples, commonest, references, strict=True):
            sample["acc_commonest"] = int(is_right(answer, reference))
        result = _score(samples)
        if groups is not None and any(groups):
            members = defaultdict(list)
            for group, sample in zip(groups, samples, strict=True):
                members[group].append(sample)
            result["groups"] = {group: _score(rows) for group, rows in members.items()}
        return {**result, "samples": samples}


def is_right(answer: str, reference: str) -> bool:
    """Return whether an answer is the reference, up to case, spaces around and a full stop.

    Args:
        answer: What the model wrote.
        reference: What is right.
    """
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).removesuffix(".")


def _commonest(references: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Of each question the commonest answer to those of its kind: the best that not looking could do."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for group, reference in zip(groups, references, strict=True):
        counts[group][_plain(reference)] += 1
    best = {group: counter.most_common(1)[0][0] for group, counter in counts.items()}
    return [best[group] for group in groups]


def _score(samples: list[dict[str, int]]) -> dict[str, Any]:
    result: dict[str, Any] = {"n": len(samples)}
    for name in (*_CONDITIONS, "acc_commonest"):
        result[name], result[f"{name}_stderr"] = mean_with_error([float(sample[name]) for sample in samples])
    for other in _OTHERS:
        gains = [float(sample["acc"] - sample[f"acc_{other}"]) for sample in samples]
        result[f"gain_over_{other}"], result[f"gain_over_{other}_stderr"] = mean_with_error(gains)
    return result
