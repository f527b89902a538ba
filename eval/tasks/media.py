"""Questions about images and sounds: digits, drawn shapes, tones, spoken words, and the user's own.

Each is asked three times: as it is, without image or sound (blind), and with those of another question (exchanged).
``limit`` counts questions. Only models of ``deepseek-moe multimodal`` are asked.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.task import DataSet, Figure, MediaQuestion, Task
from deepseek_records.media.licenses import LICENSES

_ABOUT = {
    "digits": ("Handwritten digits (8 x 8)", 360, 0.1, "One size of picture, one digit in each, in the middle."),
    "shapes": (
        "Drawn shapes",
        300,
        None,
        "Drawings by the script of the training set, no photographs.",
    ),
    "tones": (
        "Computed tones",
        300,
        None,
        "Tones by the script of the training set, no recordings.",
    ),
    "words": (
        "Spoken words (espeak-ng)",
        150,
        0.1,
        "Ten words of a speech synthesizer, no human voices.",
    ),
}


def item_builder(name: str) -> Callable[[int, int | None, str | Path | None], Iterator[MediaQuestion]]:
    """Return what yields a task's questions.

    Args:
        name: An embedded set; the user's own data take its place.
    """

    def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[MediaQuestion]:
        from deepseek_records.media.reading import load_items

        items = load_items(name if data_path is None else data_path, "validation")
        for item in items[:limit]:
            yield MediaQuestion(id=item.id, prompt=item.prompt, target=item.answer, group=item.group, media=item)

    return build_items


def metric_inputs(items: Sequence[MediaQuestion], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `media_accuracy` takes.

    Args:
        items: The questions.
        rows: Their answers.
    """
    return {
        "predictions": [row["prediction"] for row in rows],
        "references": [row["target"] for row in rows],
        "blind": [row["prediction_blind"] for row in rows],
        "exchanged": [row["prediction_exchanged"] for row in rows],
        "groups": [item.group for item in items],
    }


def _task(name: str) -> Task:
    label, number, chance, limits = _ABOUT[name]
    license, source = LICENSES[name]
    return Task(
        name=name,
        kind="media",
        build_items=item_builder(name),
        data=DataSet(name=name, label=label, split="validation", license=license, source=source, num_questions=number),
        figures=(
            Figure("acc", "right answers", chance=chance, is_share=True),
            Figure("acc_blind", "right answers, blind", higher_is_better=None, is_share=True),
            Figure("acc_exchanged", "right answers, others' media", higher_is_better=None, is_share=True),
            Figure("acc_commonest", "always the commonest answer", higher_is_better=None, is_share=True),
            Figure("gain_over_blind", "gain over blind, paired"),
            Figure("gain_over_commonest", "gain over the commonest answer, paired"),
        ),
        measures="seeing and hearing",
        max_new_tokens=8,
        metric="media_accuracy",
        metric_inputs=metric_inputs,
        does_not_show=limits,
    )


TASKS = tuple(_task(name) for name in _ABOUT)
