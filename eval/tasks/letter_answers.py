"""Multiple choice answered in words: the letter that a pattern finds in the text is the answer.

Shared by MMLU-Pro and MMLU-Redux, which lm-evaluation-harness scores so.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from deepseek_eval.tasks.task import CompletionItem

LETTERS = "ABCDEFGHIJ"


def take_letter(pattern: str, text: str) -> int:
    """Return the position of the first letter that the pattern finds, -1 where it finds none.

    Args:
        pattern: A regular expression whose one group is the letter.
        text: What the model wrote.
    """
    found = re.search(pattern, text)
    return LETTERS.index(found[1]) if found else -1


def letter_inputs(
    pattern: str, categories: dict[str, str] | None = None
) -> Callable[[Sequence[CompletionItem], Sequence[dict[str, Any]]], dict[str, Any]]:
    """Return the function that gives `choice_accuracy` what it takes.

    Args:
        pattern: As for `take_letter`.
        categories: Group to category, for a second breakdown.
    """

    def metric_inputs(items: Sequence[CompletionItem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "predictions": [take_letter(pattern, row["prediction"]) for row in rows],
            "references": [LETTERS.index(row["target"]) for row in rows],
            "groups": [item.group for item in items],
            "categories": categories or {},
        }

    return metric_inputs
