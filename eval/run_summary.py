"""What an evaluation's run folder ends with: one row per figure shown, each with its task's facts, and the data used.

Called by the harness and by `deepseek_eval.samples_reader`. The card, the report and the closing table read these rows
alone; none of them knows a task by its name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_eval.tasks.task import DataSet, Figure, Task
from deepseek_records.statistics import share_interval
from deepseek_records.summary import DataUse, Result

# What makes the figures comparable: whose prompts, stop strings and aggregation they follow.
HARNESS = "deepseek-moe, prompts and aggregation of lm-evaluation-harness 0.4.13"


def result_rows(task: Task, scores: Mapping[str, Any]) -> tuple[Result, ...]:
    """Return a task's figures as rows; a figure that could not be measured has none.

    Args:
        task: The task.
        scores: What its runner returned.
    """
    return tuple(_result_row(task, figure, scores) for figure in task.figures if scores.get(figure.name) is not None)


def _result_row(task: Task, figure: Figure, scores: Mapping[str, Any]) -> Result:
    value, stderr = scores[figure.name], scores[f"{figure.name}_stderr"]
    n = scores.get(f"{figure.name}_n", scores["n"])
    part = name_part(task.data, scores["n"])
    return Result(
        metric=figure.name,
        value=value,
        stderr=stderr,
        interval=share_interval(value, n, stderr) if figure.is_share else None,
        n=n,
        num_tokens=scores.get("num_tokens"),
        num_bytes=scores.get("num_bytes"),
        num_all=task.data.num_questions if scores["n"] < task.data.num_questions else None,
        dataset=f"{task.data.name}{part}",
        split=task.data.split or None,
        task=task.name,
        label=f"{task.label or task.data.label}{part}",
        metric_label=figure.label,
        measures=task.measures,
        is_safety=task.is_safety,
        is_share=figure.is_share,
        higher_is_better=figure.higher_is_better,
        chance=figure.chance,
        num_fewshot=scores.get("num_fewshot"),
        prompt_style="chat" if scores.get("prompt_style") == "chat" else None,
        harness=HARNESS if task.measures in ("knowledge", "code") else "deepseek-moe",
        benchmark=None if part or task.is_safety else task.data.benchmark,
        published=figure.published,
        does_not_show=task.does_not_show or None,
    )


def name_part(data: DataSet, num_asked: int) -> str:
    """Return what follows a data set's name where a part of it was asked, nothing where all of it was.

    Args:
        data: The data set.
        num_asked: Questions asked.
    """
    if num_asked < data.num_questions:
        return f", partial: {num_asked:,} of {data.num_questions:,}"
    return f", partial: {data.coverage}" if data.coverage else ""


def data_rows(tasks: Sequence[Task], counts: Mapping[str, int]) -> tuple[DataUse, ...]:
    """Return the data that the tasks read.

    Args:
        tasks: The tasks.
        counts: Questions asked, by task.
    """
    return tuple(
        DataUse(
            name=f"{task.data.name}{name_part(task.data, counts[task.name])}",
            license=task.data.license,
            source=task.data.source,
            split=task.data.split or None,
            num_rows=counts[task.name],
            used_for="evaluation",
        )
        for task in tasks
    )
