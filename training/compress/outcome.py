"""What `distill` and `quantize` write into their summaries: results, checks, and how far the model has moved."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deepseek_records.summary import Check, Result
from deepseek_training.compress.awq import LayerReport
from deepseek_training.compress.divergence import Comparison
from deepseek_training.recipes.distill import DistillRecipe
from deepseek_training.recipes.quantize import QuantizeSettings
from deepseek_training.trainer.bits_per_byte import BitsPerByte
from deepseek_training.trainer.outcome import bits_rows


def distill_outcome(
    recipe: DistillRecipe, name: str, *, before: BitsPerByte, after: BitsPerByte, teacher: BitsPerByte
) -> dict[str, Any]:
    """Return a summary's results, checks and details.

    Args:
        recipe: The settings.
        name: Of the held-out set.
        before: Of the student before its training.
        after: Of the student.
        teacher: Of the teacher, on the same text.
    """
    rows: tuple[Result, ...] = bits_rows({name: before}, when="before")
    rows += bits_rows({name: after}, when="after", baselines={name: teacher.value}, baseline_name="teacher")
    details: dict[str, Any] = {"teacher": recipe.teacher, "teacher_bits_per_byte": teacher.value}
    about = {"metric": "bits_per_byte", "dataset": name}
    what = f"bits per byte on {name} fall"
    checks = [Check.compare(what, after.value / before.value - 1, "<", 0.0, **about)]
    is_behind = before.value > teacher.value
    if is_behind:
        details["gap_closed"] = (before.value - after.value) / (before.value - teacher.value)
    if recipe.min_gap_closed is not None and is_behind:
        what = f"share of the way to the teacher's bits per byte on {name} is at least {recipe.min_gap_closed:g}"
        checks.append(Check.compare(what, details["gap_closed"], ">=", recipe.min_gap_closed, **about))
    elif recipe.min_gap_closed is not None:  # it began at or below its teacher's
        what = f"bits per byte on {name} stay at or below the teacher's"
        checks.append(Check.compare(what, after.value, "<=", teacher.value, **about))
    return {"results": rows, "checks": tuple(checks), "details": details}


def quantize_outcome(
    settings: QuantizeSettings, name: str, comparison: Comparison, reports: Sequence[LayerReport]
) -> dict[str, Any]:
    """Return a summary's results, checks and details.

    Args:
        settings: Of the command.
        name: Of the held-out set.
        comparison: Of the model before and after.
        reports: From `awq`.
    """
    before, after = comparison.before, comparison.after
    what = f"bits per byte on {name} rise by at most {settings.max_loss:.1%}"
    loss = after.value / before.value - 1
    about = {"metric": "bits_per_byte", "dataset": name}
    return {
        "results": bits_rows({name: before}, when="before") + bits_rows({name: after}, when="after"),
        "checks": (Check.compare(what, loss, "<=", settings.max_loss, **about),),
        "details": {
            "bits_per_byte_difference": comparison.difference.value,
            "bits_per_byte_difference_stderr": comparison.difference.stderr,
            "kl_divergence": comparison.divergence,
            "kl_tokens": comparison.num_tokens,
            "experts_with_few_tokens": sum(report.experts_below for report in reports),
            "layers": [dataclasses.asdict(report) for report in reports],
        },
    }
