"""The metrics shipped with the package, loaded without network. Called by the harness and its task runners."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import evaluate

from deepseek_eval.tasks.task import Task

METRICS_FOLDER = Path(__file__).resolve().parent


def load_metric(name: str) -> evaluate.Metric:
    """Return a metric shipped with the package, loaded without network.

    Args:
        name: A folder under ``metrics/``.
    """
    return evaluate.load(str(METRICS_FOLDER / name))


def score_answers(task: Task, items: Sequence[Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the task's metric makes of the answers.

    Args:
        task: Names the metric and says what it takes.
        items: The questions.
        rows: Their answers, in the same order.
    """
    if task.metric_inputs is not None:
        inputs = task.metric_inputs(items, rows)
    else:
        inputs = {
            "predictions": [row["prediction"] for row in rows],
            "references": [row["target"] for row in rows],
            "groups": [item.group for item in items],
            "categories": task.categories,
        }
    scores = load_metric(task.metric).compute(**inputs)
    return scores | ({"does_not_show": task.does_not_show} if task.does_not_show else {})
