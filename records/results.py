"""One measured figure, with what its readers need to know of it: label, kind, chance level, direction, safety or not.

A task writes these beside its scores, so that the card, the report and the closing table need no list of tasks.
"""

from dataclasses import dataclass
from typing import Literal

When = Literal["before", "after"]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A score that others published for the same benchmark.

    Args:
        by: Whose score.
        value: The score, on the same scale as ours.
        remark: How it was measured, in a word.
    """

    by: str
    value: float
    remark: str = ""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A published benchmark, all of it: a result that carries one was measured on exactly these questions.

    Args:
        hub_id: The data set's id on the Hub.
        name: What it is called.
        config: The data set's configuration.
        task_id: The task's id in the data set's own ``eval.yaml``; None where the Hub does not register it as a
            benchmark, and then nothing is written to ``.eval_results``.
    """

    hub_id: str
    name: str
    config: str | None = None
    task_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Result:
    """One measured figure.

    Args:
        metric: Its name, such as ``bits_per_byte`` or ``acc``.
        value: The figure; a figure that was not measured has no `Result`.
        stderr: Its standard error; None where there is none to estimate.
        interval: Its 95 % interval, where it is not the figure give or take 1.96 standard errors.
        n: The number of items it is over.
        num_all: The number of items that the whole data set has, where the figure is over a part of them.
        dataset: What it was measured on.
        split: The data set's split.
        when: Whether it was measured before or after the stage's training; None for neither.
        baseline: The same figure of something simpler on the same data.
        baseline_name: What that is.
        num_tokens: Tokens scored.
        num_bytes: UTF-8 bytes scored.
        task: The benchmark's name in the harness.
        label: What the task is called on a page.
        metric_label: What the figure is called on a page.
        measures: What it is about: ``knowledge``, ``code``, ``bias``, and so on.
        is_safety: Whether it belongs to bias, safety and robustness.
        is_share: Whether it is a share of items, in [0, 1].
        higher_is_better: None where neither is: a preference, a distance from an ideal.
        chance: What guessing scores.
        num_fewshot: Worked examples shown before each question.
        prompt_style: ``chat`` where a chat template was used.
        harness: Whose prompts and aggregation the figure follows.
        command: The command that measured it, where it is not the run's own.
        benchmark: The published benchmark that was run, all of it.
        published: What others scored on it.
        does_not_show: One line on what the figure leaves open.
    """

    metric: str
    value: float
    stderr: float | None = None
    interval: tuple[float, ...] | None = None
    n: int | None = None
    num_all: int | None = None
    dataset: str | None = None
    split: str | None = None
    when: When | None = None
    baseline: float | None = None
    baseline_name: str | None = None
    num_tokens: int | None = None
    num_bytes: int | None = None
    task: str | None = None
    label: str | None = None
    metric_label: str | None = None
    measures: str | None = None
    is_safety: bool = False
    is_share: bool = False
    higher_is_better: bool | None = None
    chance: float | None = None
    num_fewshot: int | None = None
    prompt_style: str | None = None
    harness: str | None = None
    command: str | None = None
    benchmark: Benchmark | None = None
    published: tuple[Published, ...] = ()
    does_not_show: str | None = None
