"""What a benchmark is: items to answer, and how an answer becomes a score.

Every task file builds one `Task`; ``harness.py`` runs it. There are two kinds of item: a question with choices, scored
by the log-likelihood of each choice, and a prompt to continue, scored by running the finished program.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice question, formatted.

    Args:
        id: Unique within the task, stable across versions.
        prompt: Everything before the answer, shots included.
        choices: The continuations to compare, leading space included.
        target: Index of the right one.
        group: What the score is also broken down by (MMLU: the subject).
        shorter_prompts: What to ask instead when the prompt does not fit the context, longest first. Without any, the
            prompt loses tokens from the left.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    target: int
    group: str
    shorter_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProgramItem:
    """One programming problem, formatted.

    Args:
        id: Unique within the task.
        prompt: What the model continues.
        stop: Strings that end a completion; what follows the first of them is cut off.
        prefix: Code that stands before the completion in the program to run.
        tests: Code that follows it and raises when the completion is wrong.
        target: The reference solution's body, shown beside the prediction.
    """

    id: str
    prompt: str
    stop: tuple[str, ...]
    prefix: str
    tests: str
    target: str

    def program(self, completion: str) -> str:
        """Return the candidate's code without its tests, as `deepseek_eval` metrics take it.

        Args:
            completion: What the model wrote after the prompt.
        """
        return self.prefix + completion


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Args:
        name: What ``--tasks`` calls it.
        kind: ``choice`` or ``program``.
        build_items: Called with the number of shots, the limit and the data folder; yields items in order.
        dataset: The data set's Hub id, for cards.
        split: The split scored.
        licence: The data's licence.
        source: Where the data came from.
        categories: Group to category, for a second breakdown.
        num_fewshot: Shots the reference uses when none are asked for.
        max_new_tokens: How much a completion may hold (programs only).
    """

    name: str
    kind: str
    build_items: Callable[[int, int | None, Path | None], Iterator[ChoiceItem | ProgramItem]]
    dataset: str
    split: str
    licence: str
    source: str
    categories: dict[str, str] = field(default_factory=dict)
    num_fewshot: int = 0
    max_new_tokens: int = 0
