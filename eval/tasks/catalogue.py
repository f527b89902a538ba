"""The benchmarks by name. Adding one is a file beside this one and a line here."""

from pathlib import Path

from deepseek_eval.tasks import (
    bbq,
    bits_per_byte,
    crows_pairs,
    humaneval,
    long_tail,
    mbpp,
    media,
    mmlu,
    mmlu_pro,
    mmlu_redux,
    mmlu_robust,
    pubmedqa,
    refusal,
    winobias,
)
from deepseek_eval.tasks.own_task import load_task
from deepseek_eval.tasks.task import Task
from deepseek_records.nearest_name import did_you_mean

_ALL = (
    *(mmlu.TASK, mmlu.HENDRYCKS_TASK, humaneval.TASK, mbpp.TASK),
    *(mmlu_pro.TASK, mmlu_redux.TASK, pubmedqa.TASK),
    *(crows_pairs.TASK, winobias.TASK, bbq.TASK, long_tail.TASK, mmlu_robust.TASK, refusal.TASK),
    bits_per_byte.TASK,
    *media.TASKS,
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    """Return the task of that name.

    Args:
        name: As in ``--tasks``; or a YAML file that describes a task of one's own.

    Raises:
        ValueError: There is none; the message suggests the nearest.
        FileNotFoundError: There is no such file.
    """
    if name.endswith((".yaml", ".yml")):
        task = load_task(Path(name))
        if task.name in TASKS:
            raise ValueError(f"{name}: name: got {task.name!r}, expected a name that no other task has")
        return task
    if name in TASKS:
        return TASKS[name]
    hint = did_you_mean(name, TASKS, cutoff=0.4)
    raise ValueError(f"tasks: got {name!r}, expected one of {', '.join(sorted(TASKS))}{hint}")
