"""What a benchmark is: items to answer, and how an answer becomes a score.

Every task file builds one `Task`; ``harness.py`` runs it. Its kind says how the model answers: ``choice`` by the one
token that each choice adds to the prompt, ``continuation`` by the log-likelihood of choices of any length, ``program``
by code that is run, ``completion`` by text that a metric reads, ``text`` by the log-likelihood of whole documents,
``media`` by text about images and sounds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_records.media.item import MediaItem
from deepseek_records.results import Benchmark, Published


@dataclass(frozen=True)
class ChoiceItem:
    """One multiple-choice question, formatted.

    Args:
        id: Unique within the task, stable across versions.
        prompt: Everything before the answer, shots included.
        choices: The continuations to compare, leading space included.
        target: The right answer; None where none is right (CrowS-Pairs).
        group: What the score is also broken down by (MMLU: the subject). Questions of one group are run together.
        context: The part of the prompt that is not the question: a description, shots.
        shorter_prompts: What to ask instead when the prompt does not fit the context, longest first. Without any, the
            prompt loses tokens from the left.
        answers: What each choice stands for, where that is not its position: the option behind a letter when options
            are reordered, the one answer behind several wordings of it.
        facts: What the task's metric needs to know beside prediction and target.
        chat_context: The context as turns of a chat; None puts it into the user's turn.
    """

    id: str
    prompt: str
    choices: tuple[str, ...]
    target: int | None
    group: str
    context: str = ""
    shorter_prompts: tuple[str, ...] = ()
    answers: tuple[int, ...] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    chat_context: tuple[dict[str, str], ...] | None = None

    def answer(self, choice: int) -> int:
        """Return the answer that a choice stands for.

        Args:
            choice: Index into `choices`.
        """
        return choice if self.answers is None else self.answers[choice]


@dataclass(frozen=True)
class CompletionItem:
    """One request to be answered in words.

    Args:
        id: Unique within the task.
        prompt: The request. A model with a chat template gets it as the user's turn.
        target: What a good answer is, for example ``refuse``.
        group: What the score is also broken down by.
        stop: Strings that end a completion.
        context: The part of the prompt that is not the question: a description, shots.
        is_request: Whether it is put as the user's turn; otherwise the model continues the prompt as it stands, unless
            ``--prompt-style chat`` asks for turns.
        facts: What the task's metric needs to know.
        chat_context: The context as turns of a chat; None puts it into the user's turn.
    """

    id: str
    prompt: str
    target: str
    group: str
    stop: tuple[str, ...] = ()
    context: str = ""
    is_request: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    chat_context: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class ChatPrompt:
    """How a programming problem is put to a chat model.

    Args:
        messages: ``role`` and ``content`` each; the last is the opening of the model's own answer.
        stop: Strings that end the answer.
        extract: Takes the code out of the answer.
    """

    messages: tuple[dict[str, str], ...]
    stop: tuple[str, ...]
    extract: Callable[[str], str]


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
        context: The part of the prompt that is not the problem: shots.
        chat: The same problem for ``--prompt-style chat``; None where the task has no such form.
    """

    id: str
    prompt: str
    stop: tuple[str, ...]
    prefix: str
    tests: str
    target: str
    context: str = ""
    chat: ChatPrompt | None = None

    def program(self, completion: str) -> str:
        """Return the candidate's code without its tests, as `deepseek_eval` metrics take it.

        Args:
            completion: What the model wrote after the prompt.
        """
        return self.prefix + completion


@dataclass(frozen=True)
class TextItem:
    """One document, all of it to be predicted.

    Args:
        id: Unique within the task.
        prompt: The text.
        group: What the score is also broken down by.
        target: None: nothing is asked.
    """

    id: str
    prompt: str
    group: str
    target: None = None


@dataclass(frozen=True)
class MediaQuestion:
    """One question about images or sounds.

    Args:
        id: Unique within the task.
        prompt: The question.
        target: The right answer.
        group: What the score is also broken down by.
        media: The same with its images and sounds.
    """

    id: str
    prompt: str
    target: str
    group: str
    media: MediaItem


@dataclass(frozen=True)
class DataSet:
    """A published data set: what a task's questions may be called if they are exactly these.

    Args:
        name: Its Hub id, or what its authors call it.
        label: What a page calls it.
        split: The split scored.
        license: As its source states it.
        source: Where it comes from.
        num_questions: How many questions the split has.
        questions_hash: What `deepseek_eval.questions.hash_questions` makes of them; None where we have not seen them.
        coverage: What part of it is embedded, where that is not all.
        benchmark: The names under which the Hub knows it as a benchmark.
    """

    name: str
    label: str
    split: str
    license: str
    source: str
    num_questions: int = 0
    questions_hash: str | None = None
    coverage: str = ""
    benchmark: Benchmark | None = None


Item = ChoiceItem | ProgramItem | CompletionItem | TextItem | MediaQuestion


@dataclass(frozen=True)
class Figure:
    """One of a metric's figures that stands in the table, the summary and the card.

    Args:
        name: Its key in the metric's result; its standard error is ``<name>_stderr``.
        label: What a page calls it.
        chance: What guessing scores.
        higher_is_better: None where neither is.
        is_share: Whether it is a share of items, in [0, 1].
        published: What others scored.
    """

    name: str
    label: str
    chance: float | None = None
    higher_is_better: bool | None = True
    is_share: bool = False
    published: tuple[Published, ...] = ()


@dataclass(frozen=True)
class Task:
    """One benchmark, with all that the table, the card and the report say of it.

    Args:
        name: What ``--tasks`` calls it.
        kind: ``choice``, ``continuation``, ``program``, ``completion``, ``text`` or ``media``.
        build_items: Called with the number of shots, the limit and the data folder (or Hub id); yields items in order.
        data: The published data set that it asks by default.
        figures: The metric's figures that are shown.
        measures: What it is about, as `deepseek_records.results.Result` has it.
        label: What a page calls it; the data set's label by default.
        is_safety: Whether it belongs to bias, safety and robustness.
        categories: Group to category, for a second breakdown.
        num_fewshot: Shots the reference uses when none are asked for.
        max_fewshot: The most shots that can be shown; 0 for a task that shows none.
        max_new_tokens: How much a completion may hold.
        metric: The folder under ``metrics/`` whose module scores the answers.
        metric_inputs: Turns items and rows (``prediction``, ``target``, scores) into the metric's arguments; None
            gives `choice_accuracy` what it takes.
        is_length_normalized: Compare choices by their mean log-likelihood a token, that is by perplexity.
        has_chat: Whether its questions, of a choice, can be put through a chat template. Completions and programs can.
        shares_answers_with: A task that asks some of the same questions under the same ids.
        does_not_show: One line on what the figures leave open, written beside them.
    """

    name: str
    kind: str
    build_items: Callable[[int, int | None, str | Path | None], Iterator[Item]]
    data: DataSet
    figures: tuple[Figure, ...]
    measures: str
    label: str = ""
    is_safety: bool = False
    categories: dict[str, str] = field(default_factory=dict)
    num_fewshot: int = 0
    max_fewshot: int = 0
    max_new_tokens: int = 0
    metric: str = "choice_accuracy"
    metric_inputs: Callable[[Sequence[Any], Sequence[dict[str, Any]]], dict[str, Any]] | None = None
    is_length_normalized: bool = False
    has_chat: bool = False
    shares_answers_with: str | None = None
    does_not_show: str = ""
