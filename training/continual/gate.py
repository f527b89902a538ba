"""The gate: whether an update is kept, by paired differences of held-out text under the old model and the new.

Every unit of a set (a document) is scored by both models. With b_i and c_i its bits before and after, n_i its bytes:

    change = sum_i (c_i - b_i) / sum_i b_i,     with the standard error of that ratio over units (the delta method)

so what is common to both models, how hard a document is, falls out of the error. The new text must gain (change <=
-min_gain - gain_errors x error), and no other set may lose (change <= max_loss + loss_errors x error). A set whose
error is larger than its bound could not show such a loss and refuses too: a gate must be able to close.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from deepseek_records.statistics import mean_with_error, ratio_with_error
from deepseek_training.recipes.update import UpdateRecipe

Kind = Literal["gain", "loss", "order", "safety", "text"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One question that the gate asks, and the answer.

    Attributes:
        kind: What is asked: does the new text gain, does a set lose, is the new text in order, is what the model
        writes
            as safe as before, is the text itself safe.
        dataset: The set.
        passed: Whether it speaks for keeping.
        value: Relative change of bits per byte (gain, loss), shuffled over ordered minus 1 (order), change of the mean
            safety (safety), share of unsafe passages (text).
        stderr: Its paired standard error; None where there is none to estimate.
        limit: What the value was compared with, errors included.
        n: Units.
        unit: What they are.
        before: Bits per byte, or mean safety, under the old model.
        after: The same under the candidate.
        why: In words, where it did not pass.
    """

    kind: Kind
    dataset: str
    passed: bool
    value: float
    stderr: float | None
    limit: float
    n: int
    unit: str
    before: float | None = None
    after: float | None = None
    why: str = ""


def compare_bits(
    before: np.ndarray, after: np.ndarray, num_bytes: np.ndarray
) -> tuple[float, float | None, float, float]:
    """Return the relative change, its paired standard error, and bits per byte before and after.

    Args:
        before: `[N]` bits of each unit under the old model.
        after: The same under the new one.
        num_bytes: `[N]` of each unit.
    """
    total = float(num_bytes.sum())
    if not np.isfinite(after).all():
        return float("inf"), None, float(before.sum()) / total, float("inf")
    change, error = ratio_with_error((after - before).tolist(), before.tolist())
    return change, error, float(before.sum()) / total, float(after.sum()) / total


def judge_gain(name: str, unit: str, bits: tuple[np.ndarray, np.ndarray, np.ndarray], recipe: UpdateRecipe) -> Finding:
    """Ask whether the new text has become likelier.

    Args:
        name: The set.
        unit: What its units are.
        bits: Before, after, and bytes, `[N]` each.
        recipe: The bounds.
    """
    change, error, before, after = compare_bits(*bits)
    limit = -recipe.min_gain - recipe.gain_errors * (error or 0.0)
    why = ""
    if error is None:
        why = f"{name}: no error to estimate, so no gain is shown"
    elif not change <= limit or change >= 0:
        why = f"{name}: changed by {change:+.2%} +- {error:.2%}, not a gain beyond {-limit:.2%}"
    return Finding("gain", name, not why, change, error, limit, len(bits[0]), unit, before, after, why)


def judge_loss(name: str, unit: str, bits: tuple[np.ndarray, np.ndarray, np.ndarray], recipe: UpdateRecipe) -> Finding:
    """Ask whether an earlier text has become less likely than its bound and error allow.

    Args:
        name: The set.
        unit: What its units are.
        bits: Before, after, and bytes, `[N]` each.
        recipe: The bounds.
    """
    change, error, before, after = compare_bits(*bits)
    limit = recipe.max_loss + recipe.loss_errors * (error or 0.0)
    why = ""
    if error is None:
        why = f"{name}: no error to estimate, so no loss can be ruled out"
    elif not change <= limit:
        why = f"{name}: lost {change:+.2%} +- {error:.2%}, above {limit:.2%}"
    elif error > recipe.max_loss:
        why = f"{name}: the error {error:.2%} is above the bound {recipe.max_loss:.2%}: too little text for a verdict"
    return Finding("loss", name, not why, change, error, limit, len(bits[0]), unit, before, after, why)


def judge_order(name: str, unit: str, ordered: np.ndarray, shuffled: np.ndarray, recipe: UpdateRecipe) -> Finding:
    """Ask whether the new text says more in its order than as a heap of its words.

    Args:
        name: The set.
        unit: What its units are.
        ordered: `[N]` bits of each unit under the candidate.
        shuffled: The same with shuffled words.
        recipe: The bounds.
    """
    gain, error = ratio_with_error((shuffled - ordered).tolist(), ordered.tolist())
    limit = (recipe.min_order_errors or 0.0) * (error or 0.0)
    passed = error is not None and gain > limit
    spread = "" if error is None else f" +- {error:.2%}"
    why = "" if passed else f"{name}: its words shuffled cost {gain:+.2%}{spread} more bits: the text has no order"
    return Finding("order", name, passed, gain, error, limit, len(ordered), unit, why=why)


def judge_safety(before: Sequence[float], after: Sequence[float], recipe: UpdateRecipe) -> Finding:
    """Ask whether what the model writes is as safe as before.

    Args:
        before: Safety of each completion of the old model.
        after: Of the candidate's, of the same prompts.
        recipe: The bounds.
    """
    assert recipe.max_safety_loss is not None
    changes = [new - old for old, new in zip(before, after, strict=True)]
    change, error = mean_with_error(changes)
    limit = -recipe.max_safety_loss - recipe.loss_errors * (error or 0.0)
    passed = error is not None and change >= limit
    spread = "" if error is None else f" +- {error:.3f}"
    why = "" if passed else f"what it writes: mean safety changed by {change:+.3f}{spread}, below {limit:.3f}"
    means = (sum(before) / len(before), sum(after) / len(after))
    return Finding("safety", "completions", passed, change, error, limit, len(changes), "prompt", *means, why)


def judge_text(name: str, safety: Sequence[float], recipe: UpdateRecipe) -> Finding:
    """Ask whether the new text itself is safe to learn from.

    Args:
        name: The set.
        safety: Of each passage.
        recipe: The bounds.
    """
    assert recipe.max_unsafe_share is not None
    share, error = mean_with_error([float(value < 0.5) for value in safety])
    passed = share <= recipe.max_unsafe_share
    why = "" if passed else f"{name}: {share:.0%} of its passages are unsafe, above {recipe.max_unsafe_share:.0%}"
    return Finding("text", name, passed, share, error, recipe.max_unsafe_share, len(safety), "passage", why=why)


def choose_candidate(changes: Mapping[float, Mapping[str, float]], new: str, recipe: UpdateRecipe) -> float:
    """Return the alpha to decide on: within all bounds the one that gains most, else the one that loses least.

    Args:
        changes: By alpha and set, the relative change on the half that chooses.
        new: The new text's set.
        recipe: The bounds.
    """

    def worst(alpha: float) -> float:
        return max((value for name, value in changes[alpha].items() if name != new), default=-float("inf"))

    within = [alpha for alpha in changes if worst(alpha) <= recipe.max_loss]
    if within:
        return min(within, key=lambda alpha: (changes[alpha][new], alpha))
    return min(changes, key=lambda alpha: (worst(alpha), alpha))


def as_rows(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return findings as JSON takes them; a figure that is not finite is left out.

    Args:
        findings: Of the gate.
    """
    rows = [dataclasses.asdict(finding) for finding in findings]
    return [{key: value for key, value in row.items() if not _is_unsayable(value)} for row in rows]


def _is_unsayable(value: Any) -> bool:
    return isinstance(value, float) and not np.isfinite(value)
