"""Accuracy on perturbed questions against the same questions as they were.

Loaded offline by ``evaluate.load(<this folder>)``. For each variant v, over the questions that exist in both forms:

    difference = accuracy(v) - accuracy(original), with the error of paired differences
    flip_rate  = share of questions whose answer (its content, not its letter) is another one than before

Surprising: accuracy may stay while many answers flip, wrong ones into right ones and back, hence both. A variant may
hold a question several times, in several orders of its options: these count as one question with their mean score.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import evaluate

from deepseek_eval.metrics.description import describe_metric
from deepseek_eval.metrics.position_bias.position_bias import measure_position_bias
from deepseek_records.statistics import mean_with_error

_CITATION = """\
@article{zhu2023promptrobust, title={{PromptRobust}: Towards Evaluating the Robustness of Large Language Models on
Adversarial Prompts}, author={Zhu et al.}, year={2023}, note={arXiv 2306.04528}}
"""
_DESCRIPTION = "Accuracy by perturbation, its paired difference to the original, flip rates, preference for letters."
_INPUTS = """
Args:
    predictions: index of the answer chosen, counted in the original order of options.
    references: index of the right answer, likewise.
    variants: how each question was perturbed; ``original`` for not at all.
    questions: which question it is, equal over its variants.
    letters: optional, index of the letter chosen.
    gold_letters: optional, index of the right letter.
    reordered: name of the variant whose options are moved, for the preference for letters.
Returns:
    acc_original, acc_perturbed, worst_difference and max_flip_rate with _stderr, n (original questions), variants;
    with letters also rstd and position_bias.
"""


class Robustness(evaluate.Metric):
    """Accuracy and flips under perturbation."""

    def _info(self) -> evaluate.MetricInfo:
        return describe_metric(
            _DESCRIPTION, _CITATION, _INPUTS, ["https://arxiv.org/abs/2306.04528", "https://arxiv.org/abs/2309.03882"]
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        variants: Sequence[str] | None = None,
        questions: Sequence[Any] | None = None,
        letters: Sequence[int] | None = None,
        gold_letters: Sequence[int] | None = None,
        reordered: str = "reordered",
    ) -> dict[Any, Any]:
        if variants is None or questions is None:
            raise ValueError("robustness: expected variants and questions beside the predictions")
        answers = defaultdict(lambda: defaultdict(list))
        for row in zip(predictions, references, variants, questions, strict=True):
            answers[row[2]][row[3]].append((row[0], row[1]))
        if "original" not in answers:
            raise ValueError(f"robustness: variants {', '.join(sorted(answers))} hold no 'original' to compare with")
        originals = {name: rows[0] for name, rows in answers.pop("original").items()}
        accuracy, error = mean_with_error([float(p == r) for p, r in originals.values()])
        result = {"acc_original": accuracy, "acc_original_stderr": error, "n": len(originals)}
        result["variants"] = {name: _compare(originals, rows) for name, rows in answers.items()}
        result |= _summarise(originals, answers, result["variants"])
        if letters is not None:
            rows = list(zip(letters, gold_letters, variants, questions, strict=True))
            result["position_bias"] = _position_bias(rows, reordered)
            for name in ("rstd", "rstd_stderr"):
                result[name] = result["position_bias"]["original"][name]
        return result


def _compare(originals: dict[Any, Any], rows: dict[Any, Any]) -> dict[Any, Any]:
    names = [name for name in rows if name in originals]
    if not names:
        raise ValueError("robustness: a variant shares no question with 'original'")
    after = [_mean([float(p == r) for p, r in rows[name]]) for name in names]
    before = [float(originals[name][0] == originals[name][1]) for name in names]
    flips = [_mean([float(p != originals[name][0]) for p, _ in rows[name]]) for name in names]
    figures = {
        "acc": mean_with_error(after),
        "difference": mean_with_error([new - old for new, old in zip(after, before, strict=True)]),
        "flip_rate": mean_with_error(flips),
    }
    result = {"n": len(names)}
    for name, (value, error) in figures.items():
        result |= {name: value, f"{name}_stderr": error}
    return result


def _summarise(originals: dict[Any, Any], answers: dict[Any, Any], variants: dict[Any, Any]) -> dict[Any, Any]:
    """The perturbed accuracy averaged by question, and the variant that costs most."""
    if not variants:
        raise ValueError("robustness: there is no variant beside 'original'")
    by_question = defaultdict(list)
    for rows in answers.values():
        for name, pairs in rows.items():
            if name in originals:
                by_question[name].append(_mean([float(p == r) for p, r in pairs]))
    perturbed, error = mean_with_error([_mean(scores) for scores in by_question.values()])
    worst = min(variants, key=lambda name: variants[name]["difference"])
    loosest = max(variants, key=lambda name: variants[name]["flip_rate"])
    return {
        "acc_perturbed": perturbed,
        "acc_perturbed_stderr": error,
        "worst_variant": worst,
        "worst_difference": variants[worst]["difference"],
        "worst_difference_stderr": variants[worst]["difference_stderr"],
        "most_flipped_variant": loosest,
        "max_flip_rate": variants[loosest]["flip_rate"],
        "max_flip_rate_stderr": variants[loosest]["flip_rate_stderr"],
    }


def _position_bias(rows: list[tuple[Any, ...]], reordered: str) -> dict[Any, Any]:
    """As the questions stand, and over all orders, where every content stands once behind every letter."""
    plain = [row for row in rows if row[2] == "original"]
    result = {"original": measure_position_bias([row[0] for row in plain], [row[1] for row in plain])}
    moved = {row[3] for row in rows if row[2] == reordered}
    every = [row for row in rows if row[2] == reordered or (row[2] == "original" and row[3] in moved)]
    if moved:
        result["all_orders"] = measure_position_bias(
            [row[0] for row in every], [row[1] for row in every], clusters=[row[3] for row in every]
        )
    return result


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
