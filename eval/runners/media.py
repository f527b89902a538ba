"""Runs the tasks about images and sounds: three answers per question, and which experts took which kind of token.

Called by ``harness.py``. All answers are greedy. Questions are asked in batches of their own order, so that a run that
goes on where it stopped writes the same answers.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from deepseek_eval.answers.prompt_style import write_prompts
from deepseek_eval.answers.samples_writer import AnswerFile
from deepseek_eval.interpret.media_routing import route_media
from deepseek_eval.metrics.loading import score_answers
from deepseek_eval.model_loading import LoadedModel
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.task import MediaQuestion, Task
from deepseek_records.media.asking import answer_items
from deepseek_records.media.pictures import keep_media
from deepseek_records.media.reading import check_media
from deepseek_records.media.shuffled import with_media_of_others, without_media
from deepseek_records.run_folder import RunFolder

# Questions whose image or sound is kept for the page: the first ones answered right, and as many answered wrong.
_NUM_SHOWN = 12
# Questions whose tokens are followed to their experts.
_NUM_ROUTED = 200


def run_media_task(
    run: RunFolder, loaded: LoadedModel, task: Task, items: Sequence[MediaQuestion], settings: EvalSettings
) -> dict[str, Any]:
    """Ask every question three times and return the metric's figures.

    Args:
        run: Where the answers go.
        loaded: Model, tokenizer and processor.
        task: A task of kind ``media``.
        items: Its questions.
        settings: Batch size and length of answers.

    Raises:
        ValueError: The model takes no such media, or a file is damaged.
        FileNotFoundError: A file is missing.
    """
    check_model(loaded, task, items)
    samples = AnswerFile(run, task, items)
    asked = [item.media for item in items]
    ways = {"": asked, "_blind": without_media(asked), "_exchanged": with_media_of_others(asked)}
    most = settings.max_new_tokens or task.max_new_tokens
    starts = [
        start
        for start in range(0, len(items), settings.batch_size)
        if any((item.id, 0) not in samples.rows for item in items[start : start + settings.batch_size])
    ]
    with tqdm(total=len(starts), desc=f"evaluate {task.name}", unit="batch") as bar:
        for start in starts:
            part = slice(start, start + settings.batch_size)
            answers = {
                way: answer_items(loaded.model, loaded.processor, questions[part], most)
                for way, questions in ways.items()
            }
            samples.append(
                {
                    "id": item.id,
                    "prediction": answers[""][number],
                    "prediction_blind": answers["_blind"][number],
                    "prediction_exchanged": answers["_exchanged"][number],
                    "target": item.target,
                    "group": item.group,
                }
                for number, item in enumerate(items[part])
            )
            bar.update()
    rows = [samples.rows[item.id, 0] for item in items]
    scores = score_answers(task, items, rows)
    rows = [row | outcome for row, outcome in zip(rows, scores.pop("samples"), strict=True)]
    with contextlib.suppress(ValueError):  # a dense model, or a router that does not tell its choice
        scores["experts"] = route_media(loaded, asked[:_NUM_ROUTED], settings.batch_size)
    shown = [
        item
        for right in (1, 0)
        for item in [one for one, row in zip(items, rows, strict=True) if row["acc"] == right][:_NUM_SHOWN]
    ]
    rate = loaded.processor.feature_extractor.sampling_rate if loaded.processor.audio_seq_length else None
    keep_media([item.media for item in shown], run.path / "media" / task.name, rate)
    samples.finish(rows)
    write_prompts(run, task, items)
    return {**scores, "max_new_tokens": most}


def check_model(loaded: LoadedModel, task: Task, items: Sequence[MediaQuestion]) -> None:
    """Refuse a model that cannot be asked, and media that cannot be read.

    Args:
        loaded: The model.
        task: The task.
        items: Its questions.

    Raises:
        ValueError: Either.
        FileNotFoundError: A file is missing.
    """
    processor = loaded.processor
    if processor is None:
        raise ValueError(
            f"tasks: got {task.name} for a model that only reads, expected one made by deepseek-moe multimodal"
        )
    hears = processor.audio_seq_length is not None
    check_media(
        [item.media for item in items],
        processor.feature_extractor.sampling_rate if hears else None,
        processor.audio_seconds,
        has_eyes=processor.image_seq_length is not None,
    )
