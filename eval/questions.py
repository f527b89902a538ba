"""The questions of a task under given settings: read, checked, and told apart by content.

Called by the harness and by `deepseek_eval.samples_reader`. A published name is used only for questions whose hash is
that set's; anything else is called what its folder is called. The hash of one question leaves out what stands around
it (a description, shots), so that two runs can be compared that show different shots.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.catalogue import find_task
from deepseek_eval.tasks.task import ChoiceItem, DataSet, MediaQuestion, ProgramItem, Task, TextItem
from deepseek_records.hashes import hash_rows, hash_texts

NOT_STATED = "not stated"
# Hexadecimal digits of one question's hash, 64 bits: enough to tell the questions of a set apart.
_NUM_DIGITS = 16


@dataclass(frozen=True)
class Questions:
    """What one task is about to ask.

    Args:
        task: The task, with the data that the questions really are.
        items: The questions, under the settings' shots and limit.
    """

    task: Task
    items: list[Any]

    @property
    def content_hash(self) -> str:
        """A hash of all that the model is shown and scored by; a resumed run must find the same."""
        return hash_rows(_show(item) for item in self.items)


def read_questions(task: Task, settings: EvalSettings) -> Questions:
    """Read and check every row of a task's data, and return what is to be asked.

    Args:
        task: The task.
        settings: Shots, limit and data.

    Raises:
        FileNotFoundError: The data are not there.
        ValueError: They are empty, or a row is not such as the task reads.
    """
    limit, source = settings.limit_of(task), settings.source_of(task)
    task = _unshare(task, settings)
    if source is None:
        return Questions(task, _build_items(task, settings, limit))
    whole = _build_items(task, settings, None)
    items = whole if limit is None else _build_items(task, settings, limit)
    return Questions(_name_data(task, source, whole), items)


def build_items(task: Task, settings: EvalSettings) -> list[Any]:
    """Return a task's items.

    Args:
        task: The task.
        settings: Shots, limit and data.
    """
    return read_questions(task, settings).items


def _build_items(task: Task, settings: EvalSettings, limit: int | None) -> list[Any]:
    items = list(_iterate_items(task, settings, limit))
    if not items:
        raise ValueError(f"data: task {task.name} has no items; its file is empty")
    return items


def _iterate_items(task: Task, settings: EvalSettings, limit: int | None) -> Iterator[Any]:
    try:
        yield from task.build_items(settings.shots_of(task), limit, settings.source_of(task))
    except KeyError as error:
        raise ValueError(f"data: a row of {task.name} has no column {error}") from None


def _name_data(task: Task, source: str | Path, items: Sequence[Any]) -> Task:
    """The task with what its questions may be called: the published set if they are it, else the folder's name."""
    published = task.data
    base = [item for item in items if _is_original(item)]
    if published.questions_hash is not None and hash_questions(base) == published.questions_hash:
        return task
    if isinstance(source, str):
        # Of a set that we have not seen, its own place on the Hub vouches.
        if published.questions_hash is None and source == published.name:
            return replace(task, data=replace(published, num_questions=len(base), coverage=""))
        name, origin = source, f"https://huggingface.co/datasets/{source.partition(':')[0]}"
    else:
        name, origin = source.resolve().name, "own data"
    own = DataSet(name=name, label=name, split="", license=NOT_STATED, source=origin, num_questions=len(base))
    figures = tuple(replace(figure, published=()) for figure in task.figures)  # scores on other questions
    return replace(task, data=own, figures=figures, label=f"{name} as {task.name}" if task.label else "")


def _is_original(item: Any) -> bool:
    """False for a question that was made from another one (mmlu_robust)."""
    return not isinstance(item, ChoiceItem) or item.facts.get("question", item.id) == item.id


def hash_questions(items: Sequence[Any]) -> str:
    """Return the hash of a set of questions, whatever their order and the shots before them.

    Args:
        items: The questions.
    """
    return hash_texts(sorted(hash_question(item) for item in items))


def hash_question(item: Any) -> str:
    """Return the hash of one question: what is asked, what may be answered, and what counts as right.

    Args:
        item: An item of any kind.
    """
    if isinstance(item, ChoiceItem):
        is_plain = item.answers in (None, tuple(range(len(item.choices))))
        answers = None if is_plain else item.answers
        parts: list[Any] = [item.prompt.removeprefix(item.context), item.choices, answers, item.target, item.group]
    elif isinstance(item, ProgramItem):
        parts = [item.prompt.removeprefix(item.context), item.tests]
    elif isinstance(item, TextItem):
        parts = [item.prompt]
    elif isinstance(item, MediaQuestion):
        parts = item.media.to_row()
    else:
        parts = [item.prompt.removeprefix(item.context), item.target, item.group]
    return hash_rows([parts])[:_NUM_DIGITS]


def _show(item: Any) -> list[Any]:
    shown = [item.id, item.prompt, item.target, hash_question(item)]
    if isinstance(item, ChoiceItem):
        shown += [item.choices, item.shorter_prompts, item.facts.get("frequency")]
    return shown


def _unshare(task: Task, settings: EvalSettings) -> Task:
    """The task without the answers of another one that reads its questions elsewhere or in other company."""
    if task.shares_answers_with is None:
        return task
    other = find_task(task.shares_answers_with)
    same_data = settings.source_of(task) == settings.source_of(other)
    same_shots = settings.shots_of(task) == settings.shots_of(other)
    return task if same_data and same_shots else replace(task, shares_answers_with=None)
