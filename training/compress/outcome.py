"""What `distill` writes into its summary: results, checks, and how much of the way to the teacher was made."""

from typing import Any

from deepseek_records.summary import Check, Result
from deepseek_training.recipes.distill import DistillRecipe
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
    rows += bits_rows({name: after}, when="after", baseline=teacher.value, baseline_name="teacher")
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
