"""Benchmark scores against chance: levels, intervals and the one word a reader needs.

Surprising: at a score of zero the usual standard error is zero too, so intervals are Wilson's,
which stay honest there.
"""

from typing import Any

from deepseek_records.statistics import wilson_interval
from deepseek_records.summary import Result

# Hub id, name, configuration, chance level and published scores of the benchmarks that `deepseek_eval` runs; `tasks`
# are the harness' names of what measures it (other tasks over the same data are no such measure).
BENCHMARKS = {
    "mmlu": {
        "key": "mmlu",
        "hub_id": "cais/mmlu",
        "name": "MMLU",
        "config": "all",
        "chance": 0.25,
        "tasks": ("mmlu", "mmlu_hendrycks"),
        "published": {"DeepSeek-V3 base": (0.871, "5-shot"), "the article": (0.823, "")},
    },
    "humaneval": {
        "key": "humaneval",
        "hub_id": "openai/openai_humaneval",
        "name": "HumanEval",
        "config": None,
        "chance": 0.0,
        "tasks": ("humaneval",),
        "published": {"DeepSeek-V3 base": (0.652, "0-shot"), "the article": (0.723, "see note")},
    },
    "mbpp": {
        "key": "mbpp",
        "hub_id": "google-research-datasets/mbpp",
        "name": "MBPP",
        "config": "full",
        "chance": 0.0,
        "tasks": ("mbpp",),
        "published": {},
    },
}
PUBLISHED_NOTE = (
    "DeepSeek-V3 base: DeepSeek-AI 2024, arXiv 2412.19437, Table 3. The article does not tell its shots; its "
    "HumanEval, 72.3, is no multiple of 1/164 (118 solved are 71.95, 119 are 72.56), so it implies sampling or "
    "another set."
)
SHARE_METRICS = ("acc", "acc_norm", "exact_match", "pass_at_1", "pass@1")


def benchmark_of(row: Result) -> dict[str, Any] | None:
    """Return the benchmark that a result belongs to, or None: other measures on its data are not it.

    Args:
        row: A measured figure.
    """
    name = str(row.dataset).lower()
    known = next((known for key, known in BENCHMARKS.items() if name in (key, known["hub_id"].lower())), None)
    return known if known and (row.task or known["key"]) in known["tasks"] else None


def chance_level(row: Result) -> float | None:
    """Return what guessing would score on a result's benchmark, or None where that is not known.

    Args:
        row: A measured figure.
    """
    if row.chance is not None:
        return row.chance
    known = benchmark_of(row)
    return known["chance"] if known and row.metric in SHARE_METRICS else None


def compare_to_chance(row: Result, chance: float | None) -> str:
    """Say whether guessing lies within a result's 95 % interval.

    Args:
        row: A measured figure.
        chance: What guessing scores, or None.
    """
    if chance is None:
        return ""
    if chance == 0 and row.value == 0:
        # The usual error of a share is zero at zero; what n failures do bound is 1 - 0.05^(1/n).
        return f"none solved (under {1 - 0.05 ** (1 / row.n):.1%} at 95 % confidence)" if row.n else "none solved"
    low, high = score_interval(row)
    if low is None:
        return "no error known, so not compared"
    if low <= chance <= high:
        return "at chance"
    return "above chance" if row.value > chance else "below chance"


def score_interval(row: Result) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % interval of a share: Wilson's where the number of items is known, else two standard errors.

    Args:
        row: A measured figure.
    """
    if row.n:
        return wilson_interval(row.value, row.n)
    if row.stderr is not None:
        return row.value - 2 * row.stderr, row.value + 2 * row.stderr
    return None, None
