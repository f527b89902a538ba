"""The questions of a task under given settings: read, counted, and told apart by content.

Called by the harness and by `deepseek_eval.samples_reader`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.catalogue import find_task
from deepseek_eval.tasks.task import Task


def build_items(task: Task, settings: EvalSettings) -> list[Any]:
    """Return a task's items.

    Args:
        task: The task.
        settings: Shots, limit and data.

    Raises:
        FileNotFoundError: The data are not there.
        ValueError: They are empty, or not such as the task reads.
    """
    items = list(iterate_items(task, settings, settings.limit_of(task)))
    if not items:
        raise ValueError(f"data: task {task.name} has no items; its file is empty")
    return items


def iterate_items(task: Task, settings: EvalSettings, limit: int | None) -> Iterator[Any]:
    """Yield a task's items.

    Args:
        task: The task.
        settings: Shots and data.
        limit: As `deepseek_eval.settings.EvalSettings` has it, for this task.

    Raises:
        ValueError: A row lacks what the task reads.
    """
    try:
        yield from task.build_items(settings.shots_of(task), limit, settings.source_of(task))
    except KeyError as error:
        raise ValueError(f"data: a row of {task.name} has no column {error}") from None


def check_data(tasks: Sequence[Task], settings: EvalSettings) -> None:
    """Fail for data that is not there before a model is loaded, not when its task comes up."""
    for task in tasks:
        next(iterate_items(task, settings, 1), None)


def unshare(task: Task, settings: EvalSettings) -> Task:
    """Return the task without the answers of another one that reads its questions elsewhere or in other company."""
    if task.shares_answers_with is None:
        return task
    other = find_task(task.shares_answers_with)
    same_data = settings.source_of(task) == settings.source_of(other)
    same_shots = settings.shots_of(task) == settings.shots_of(other)
    return task if same_data and same_shots else replace(task, shares_answers_with=None)
