"""Benchmark scores against chance: intervals and the one word a reader needs.

Chance levels, published scores and labels stand in the rows themselves, written by the task. At a score of
zero the usual standard error is zero too, so intervals of shares are Wilson's, which stay honest there.
"""

from deepseek_records.statistics import share_interval
from deepseek_records.summary import Result

PUBLISHED_NOTE = (
    "DeepSeek-V3 base: DeepSeek-AI 2024, arXiv 2412.19437, Table 3. The article does not tell its shots; its "
    "HumanEval, 72.3, is not a multiple of 1/164 (118 solved are 71.95, 119 are 72.56), so it implies sampling or "
    "another set."
)


def compare_to_chance(row: Result) -> str:
    """Say whether guessing lies within a result's 95 % interval; nothing where chance is not known.

    Args:
        row: A measured figure.
    """
    if row.chance is None:
        return ""
    if row.chance == 0 and row.value == 0:
        # The usual error of a share is zero at zero; what n failures do bound is 1 - 0.05^(1/n).
        return f"none solved (under {1 - 0.05 ** (1 / row.n):.1%} at 95 % confidence)" if row.n else "none solved"
    interval = score_interval(row)
    if interval is None:
        return "no error known, so not compared"
    if interval[0] <= row.chance <= interval[1]:
        return "at chance"
    return "above chance" if row.value > row.chance else "below chance"


def score_interval(row: Result) -> tuple[float, ...] | None:
    """Return a figure's 95 % interval, None where nothing gives one.

    Args:
        row: A measured figure: with its own interval, a share of ``n`` items, or with a standard error.
    """
    if row.interval is not None:
        return row.interval
    if row.is_share and row.n:
        return share_interval(row.value, row.n, row.stderr)
    if row.stderr:
        return row.value - 1.96 * row.stderr, row.value + 1.96 * row.stderr
    return None
