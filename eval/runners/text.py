"""Runs the tasks that are answered by text of any length: by choosing a continuation, or by writing one.

Called by ``harness.py`` beside its own multiple-choice and programming tasks; what the answers mean is left to the
task's metric. A model with a chat template gets a request as the user's turn, one without gets it plain
with a newline, for a model of the second kind was never told what a turn is.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from deepseek_eval.answers.continuations import (
    EncodedContinuations,
    encode_continuations,
    plan_continuations,
    score_continuations,
)
from deepseek_eval.answers.generation import EncodedPrompt, SamplingSettings, complete_batches, plan_prompts
from deepseek_eval.answers.prompt_style import apply_chat, write_prompts
from deepseek_eval.answers.samples_writer import AnswerFile
from deepseek_eval.metrics.loading import score_answers
from deepseek_eval.model_loading import LoadedModel
from deepseek_eval.runners.truncation import warn_of_truncation
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.task import ChoiceItem, CompletionItem, Task
from deepseek_records.run_folder import RunFolder
from deepseek_records.user_text import protect, render_chat


def run_continuation_task(
    run: RunFolder, loaded: LoadedModel, task: Task, items: Sequence[ChoiceItem], settings: EvalSettings
) -> dict[str, Any]:
    """Choose the likeliest continuation of every item and return the metric's figures.

    Args:
        run: Where the answers go.
        loaded: Model and tokenizer.
        task: A task of kind ``continuation``, or of kind ``choice`` in a chat, where an answer may be several tokens.
        items: Its items.
        settings: Batch size, shots and the style of prompts.

    Raises:
        ValueError: An answer that cannot be scored, or a model that returns NaN.
    """
    samples = AnswerFile(run, task, items)
    if settings.prompt_style == "chat":
        items = apply_chat(items, loaded.tokenizer, str(run.settings["model_name_or_path"]))
    batches = plan_continuations(encode_continuations(loaded, items), settings.batch_size)
    missing = [batch for batch in batches if any((row.item.id, 0) not in samples.rows for row in batch)]
    num_done = len(items) - sum(map(len, missing))
    with tqdm(total=len(items), initial=num_done, desc=f"evaluate {task.name}", unit="question") as bar:
        for row, scores in score_continuations(loaded, missing):
            samples.append([_continuation_row(task, row, scores)])
            bar.update()
    rows = [samples.rows[item.id, 0] for item in items]
    scores = score_answers(task, items, rows)
    samples.finish(rows)
    write_prompts(run, task, items)
    return {
        **scores,
        "num_fewshot": settings.shots_of(task),
        **({"prompt_style": "chat"} if settings.prompt_style == "chat" else {}),
        "num_truncated": warn_of_truncation(task, rows, loaded.max_length),
        "context": loaded.max_length,
    }


def _continuation_row(task: Task, row: EncodedContinuations, scores: list[float]) -> dict[str, Any]:
    compared = scores
    if task.is_length_normalized:
        compared = [score / count for score, count in zip(scores, row.num_scored, strict=True)]
    # The first of equal scores wins, as numpy's argmax does in lm-eval.
    choice = max(range(len(compared)), key=compared.__getitem__)
    prediction = row.item.answer(choice)
    answer = {"id": row.item.id, "prediction": prediction, "target": row.item.target}
    if row.item.target is not None:
        answer["acc"] = int(prediction == row.item.target)
    return {
        **answer,
        "choice": choice,
        "loglikelihoods": scores,
        "num_tokens": list(row.num_scored),
        "group": row.item.group,
        "is_truncated": row.is_truncated,
    }


def run_completion_task(
    run: RunFolder, loaded: LoadedModel, task: Task, items: Sequence[CompletionItem], settings: EvalSettings
) -> dict[str, Any]:
    """Answer every request greedily, unless sampling is asked for, and return the metric's figures.

    Args:
        run: Where the answers go.
        loaded: Model and tokenizer.
        task: A task of kind ``completion``.
        items: Its items.
        settings: Batch size and the settings of sampling; one answer per request whatever ``num_samples`` says.

    Raises:
        ValueError: The context leaves no room for a prompt.
    """
    samples = AnswerFile(run, task, items)
    sampling = SamplingSettings(
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    is_chat = settings.prompt_style == "chat" or (items[0].is_request and loaded.tokenizer.chat_template is not None)
    items = put_requests(items, loaded.tokenizer, settings.prompt_style, str(run.settings["model_name_or_path"]))
    batches = plan_prompts(loaded, items, sampling, settings.batch_size)
    missing = [batch for batch in batches if any((prompt.item.id, 0) not in samples.rows for prompt in batch)]
    with tqdm(total=len(missing) * sampling.max_new_tokens, desc=f"evaluate {task.name}", unit="step") as bar:
        for number, batch in enumerate(missing, start=1):
            pairs = complete_batches(loaded, [batch], sampling, bar.update)
            samples.append(_completion_row(prompt, text) for prompt, text in pairs)
            bar.update(number * sampling.max_new_tokens - bar.n)  # Batches may end before the length limit.
    rows = [samples.rows[item.id, 0] for item in items]
    scores = score_answers(task, items, rows)
    outcomes = scores.pop("samples", None) or _right_and_wrong(task, items, rows)
    rows = [row | outcome for row, outcome in zip(rows, outcomes, strict=True)]
    samples.finish(rows)
    write_prompts(run, task, items)
    return {
        **scores,
        "num_fewshot": settings.shots_of(task),
        "prompt_style": "chat" if is_chat else "plain",
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "num_truncated": warn_of_truncation(task, rows, loaded.max_length),
    }


def _right_and_wrong(
    task: Task, items: Sequence[CompletionItem], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What each answer was taken for, and whether it is right, for a metric that compares answers one by one."""
    assert task.metric_inputs is not None
    inputs = task.metric_inputs(items, rows)
    pairs = zip(inputs["predictions"], inputs["references"], strict=True)
    return [{"answer": prediction, "acc": int(prediction == reference)} for prediction, reference in pairs]


def put_requests(
    items: Sequence[CompletionItem], tokenizer: PreTrainedTokenizerBase, style: str, source: str
) -> list[CompletionItem]:
    """Return requests as the model is asked.

    Args:
        items: The requests.
        tokenizer: Whose chat template is used.
        style: ``base`` or ``chat``.
        source: The model's name, for errors.

    Raises:
        ValueError: There is no chat template, or it refuses a request.
    """
    if style == "chat":
        return apply_chat(items, tokenizer, source)
    return [_as_user_turn(item, tokenizer) for item in items]


def _as_user_turn(item: CompletionItem, tokenizer: PreTrainedTokenizerBase) -> CompletionItem:
    """The request as the model was taught to read one: the user's turn of its chat template, else a line of text."""
    if not item.is_request:
        return item
    if tokenizer.chat_template is None:
        return dataclasses.replace(item, prompt=f"{protect(item.prompt, tokenizer)}\n")
    turns = [{"role": "user", "content": item.prompt}]
    return dataclasses.replace(item, prompt=render_chat(turns, tokenizer, add_generation_prompt=True))


def _completion_row(prompt: EncodedPrompt, text: str) -> dict[str, Any]:
    return {
        "id": prompt.item.id,
        "prediction": text,
        "target": prompt.item.target,
        "group": prompt.item.group,
        "is_truncated": prompt.is_truncated,
    }
