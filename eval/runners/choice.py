"""Runs the tasks that are answered by the one token that each choice adds to the prompt (MMLU)."""

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from deepseek_eval.answers.loglikelihood import (
    EncodedItem,
    encode_items,
    plan_batches,
    score_batches,
    supports_shared_prefix,
)
from deepseek_eval.answers.prompt_style import write_prompts
from deepseek_eval.answers.samples_writer import AnswerFile
from deepseek_eval.metrics.loading import score_answers
from deepseek_eval.model_loading import LoadedModel
from deepseek_eval.runners.truncation import warn_of_truncation
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.task import ChoiceItem, Task
from deepseek_records.run_folder import RunFolder


def run_choice_task(
    run: RunFolder, loaded: LoadedModel, task: Task, items: Sequence[ChoiceItem], settings: EvalSettings
) -> dict[str, Any]:
    """Choose an answer to every question and return the metric's figures.

    Args:
        run: Where the answers go.
        loaded: Model and tokenizer.
        task: A task of kind ``choice``.
        items: Its questions.
        settings: Shots and batch size.

    Raises:
        ValueError: A question that cannot be scored, or a model that returns NaN.
    """
    samples = AnswerFile(run, task, items)
    encoded = encode_items(loaded, items)
    can_share = settings.shots_of(task) > 0 and supports_shared_prefix(loaded)
    batches = plan_batches(encoded, settings.batch_size, can_share)
    missing = [batch for batch in batches if any((row.item.id, 0) not in samples.rows for row in batch.rows)]
    num_done = sum(len(batch.rows) for batch in batches) - sum(len(batch.rows) for batch in missing)
    with tqdm(total=len(items), initial=num_done, desc=f"evaluate {task.name}", unit="question") as bar:
        for row, logprobs in score_batches(loaded, missing):
            samples.append([_choice_row(row, logprobs)])
            bar.update()
    rows = [samples.rows[item.id, 0] for item in items]
    scores = score_answers(task, items, rows)
    samples.finish(rows)
    write_prompts(run, task, items)
    return {
        **scores,
        "num_fewshot": settings.shots_of(task),
        "num_truncated": warn_of_truncation(task, rows, loaded.max_length),
        "context": loaded.max_length,
    }


def _choice_row(row: EncodedItem, scores: list[float]) -> dict[str, Any]:
    # The first of equal scores wins, as numpy's argmax does in lm-eval.
    choice = max(range(len(scores)), key=scores.__getitem__)
    prediction = row.item.answer(choice)
    return {
        "id": row.item.id,
        "prediction": prediction,
        "target": row.item.target,
        "acc": int(prediction == row.item.target),
        "loglikelihoods": scores,
        "group": row.item.group,
        "is_truncated": row.is_truncated,
        **({} if row.item.answers is None else {"choice": choice}),
    }
