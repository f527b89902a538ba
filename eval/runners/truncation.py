"""Says how many prompts of a task lost tokens to the context: such a score is not the benchmark's."""

import logging
from collections.abc import Sequence
from typing import Any

from deepseek_eval.tasks.task import Task

logger = logging.getLogger(__name__)


def warn_of_truncation(task: Task, rows: Sequence[dict[str, Any]], max_length: int) -> int:
    """Return how many answers were given to a cut prompt, with a warning if there are any.

    Args:
        task: The task.
        rows: Its answers.
        max_length: The model's context in tokens.
    """
    num_truncated = sum(row["is_truncated"] for row in rows)
    if num_truncated:
        logger.warning(
            "%s: %d of %d prompts lost tokens to the context of %d", task.name, num_truncated, len(rows), max_length
        )
    return num_truncated
