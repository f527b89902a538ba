"""The benchmarks by name. Adding one is a file beside this one and a line here."""

import difflib

from deepseek_eval.tasks import humaneval, mbpp, mmlu
from deepseek_eval.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (mmlu.TASK, mmlu.HENDRYCKS_TASK, humaneval.TASK, mbpp.TASK)}


def find_task(name: str) -> Task:
    """Return the task of that name.

    Args:
        name: As in ``--tasks``.

    Raises:
        ValueError: There is none; the message suggests the nearest.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.4)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise ValueError(f"tasks: unknown task {name!r}; {hint}known are {', '.join(sorted(TASKS))}")
