"""Runs the tasks that score whole texts: every token of every document, in windows where one is longer."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from deepseek_eval.answers.prompt_style import write_prompts
from deepseek_eval.answers.samples_writer import AnswerFile
from deepseek_eval.metrics.loading import score_answers
from deepseek_eval.model_loading import DEFAULT_MAX_LENGTH, LoadedModel
from deepseek_eval.served_model import ServedModel
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.task import Task, TextItem
from deepseek_records.document_tokens import Window, cut_windows, mark_documents, score_windows, with_start
from deepseek_records.run_folder import RunFolder
from deepseek_records.user_text import encode_documents_plainly

# Tokens in one forward pass: the logits of all of them are held at once.
_MOST_TOKENS = 8192


def run_text_task(
    run: RunFolder, loaded: LoadedModel, task: Task, items: Sequence[TextItem], settings: EvalSettings
) -> dict[str, Any]:
    """Score every document and return the metric's figures.

    Args:
        run: Where the scores go.
        loaded: Model and tokenizer.
        task: A task of kind ``text``.
        items: Its documents.
        settings: Batch size and length of the windows.

    Raises:
        ValueError: The tokenizer marks no text's beginning, or a model that returns NaN.
    """
    samples = AnswerFile(run, task, items)
    encoded = encode_documents_plainly([item.prompt for item in items], loaded.tokenizer)
    documents = with_start(mark_documents(encoded, loaded.tokenizer), loaded.tokenizer)
    length = settings.max_length or min(loaded.max_length, DEFAULT_MAX_LENGTH)
    windows = cut_windows(documents, length)
    groups = [part for part in plan_groups(windows, settings.batch_size, length) if _is_missing(part, items, samples)]
    with tqdm(total=sum(map(len, groups)), desc=f"evaluate {task.name}", unit="window") as bar:
        for group in groups:
            sums = _score_group(loaded, documents, group, settings.batch_size, length, bar)
            samples.append(_row(items[index], documents[index], *sums[index]) for index in sorted(sums))
    rows = [samples.rows[item.id, 0] for item in items]
    scores = score_answers(task, items, rows)
    samples.finish(rows)
    write_prompts(run, task, items)
    totals = {name: sum(row[name] for row in rows) for name in ("num_tokens", "num_bytes")}
    return {**scores, **totals, "context": length}


def plan_groups(windows: Sequence[Window], batch_size: int, length: int) -> list[list[Window]]:
    """Return the windows of whole documents together, so many that they fill a batch; longest documents first.

    A group depends on the documents alone, so that an interrupted run that goes on computes the same numbers.

    Args:
        windows: In the documents' order.
        batch_size: Windows wanted per forward pass.
        length: Tokens of the longest window.
    """
    by_document: dict[int, list[Window]] = {}
    for window in windows:
        by_document.setdefault(window.document, []).append(window)
    groups: list[list[Window]] = []
    for part in sorted(by_document.values(), key=lambda part: -part[-1].end):
        if not groups or len(groups[-1]) >= _num_rows(batch_size, length):
            groups.append([])
        groups[-1] += part
    return groups


def _num_rows(batch_size: int, length: int) -> int:
    return max(1, min(batch_size, _MOST_TOKENS // length))


def _is_missing(group: Sequence[Window], items: Sequence[TextItem], samples: AnswerFile) -> bool:
    return any((items[window.document].id, 0) not in samples.rows for window in group)


def _score_group(
    loaded: LoadedModel, documents: Sequence[np.ndarray], group: list[Window], batch_size: int, length: int, bar: Any
) -> dict[int, tuple[float, int]]:
    """By document: the summed -log P, and the number of windows."""
    sums: dict[int, tuple[float, int]] = {}
    for batch in _batches(group, _num_rows(batch_size, length)):
        for window, nats in zip(batch, _score_batch(loaded, documents, batch), strict=True):
            if not math.isfinite(nats):
                raise ValueError("model: the losses of a document are NaN or infinite; its scores mean nothing")
            total, count = sums.get(window.document, (0.0, 0))
            sums[window.document] = (total + nats, count + 1)
        bar.update(len(batch))
    return sums


def _score_batch(loaded: LoadedModel, documents: Sequence[np.ndarray], batch: list[Window]) -> list[float]:
    """The summed -log P of each window."""
    if not isinstance(loaded.model, ServedModel):
        return score_windows(loaded.model, documents, batch)
    rows = [documents[window.document][window.begin : window.end].tolist() for window in batch]
    return [-total for total in loaded.model.sum_last(rows, [window.num_targets for window in batch])]


def _batches(group: list[Window], size: int) -> Iterator[list[Window]]:
    # Equal lengths together, so that short documents cost no padding.
    ordered = sorted(group, key=lambda window: window.begin - window.end)
    yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def _row(item: TextItem, document: np.ndarray, nats: float, num_windows: int) -> dict[str, Any]:
    num_bytes = len(item.prompt.encode())
    return {
        "id": item.id,
        "bits_per_byte": nats / math.log(2) / num_bytes,
        "loglikelihood": -nats,
        "num_tokens": len(document) - 1,
        "num_bytes": num_bytes,
        "num_windows": num_windows,
        "group": item.group,
    }
