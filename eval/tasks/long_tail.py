"""MMLU by how common a question's terms are: does accuracy fall from the head to the long tail?

A question's frequency is the mean of log10(1 + count) over the distinct words (four letters or more) of question and
right answer, without the reference text's function words (above one in a thousand of its words). The embedded counts
are of the package's own training text, the training split of its books and medicine, 1.5 million words, so "rare"
means rare there. With ``--data long_tail=DIR`` they are of the reader's own text (``reference_text.jsonl`` with a
column ``text``, or ``reference_text.txt``): for a model of one's own, what it was trained on. The
questions, and so the answers, are ``mmlu``'s; in one run they are asked once.

Reference: Kandpal et al., 2023, "Large Language Models Struggle to Learn Long-Tail Knowledge", arXiv 2211.08411.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deepseek_eval.tasks import mmlu
from deepseek_eval.tasks.rows import find_file, read_rows
from deepseek_eval.tasks.task import ChoiceItem, Figure

FUNCTION_WORD_SHARE = 1e-3
_WORD = re.compile(r"[a-z]{4,}")


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[ChoiceItem]:
    """Yield MMLU's questions with the frequency of their terms.

    Args:
        num_fewshot: As `mmlu.build_items`.
        limit: At most this many questions per subject.
        data_path: A folder with ``reference_text.jsonl[.gz]`` or ``reference_text.txt[.gz]``, with MMLU's files too
            where those shall be read; None for what is embedded.

    Raises:
        FileNotFoundError: The folder holds neither.
    """
    counts = read_counts(data_path)
    is_folder = isinstance(data_path, Path) and data_path.is_dir()
    has_questions = is_folder and find_file("mmlu_test", data_path) is not None
    for item in mmlu.build_items(num_fewshot, limit, data_path if has_questions else None):
        row = item.facts["row"]
        text = f"{row['question']} {row['choices'][row['answer']]}"
        yield replace(item, facts={"frequency": term_frequency(text, counts)})


def count_words(texts: Iterable[str]) -> Counter[str]:
    """Return how often each word of four letters or more occurs, in lower case.

    Args:
        texts: Documents.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_WORD.findall(text.lower()))
    return counts


def drop_function_words(counts: Counter[str]) -> dict[str, int | None]:
    """Return the counts with None for words so common that they say nothing of a question.

    Args:
        counts: From `count_words`.
    """
    most = FUNCTION_WORD_SHARE * counts.total()
    return {word: None if count > most else count for word, count in counts.items()}


def term_frequency(text: str, counts: Mapping[str, int | None]) -> float | None:
    """Return the mean of log10(1 + count) over the distinct words, None where there is no word to count.

    Args:
        text: Question and right answer.
        counts: From `drop_function_words`; a word that is not in it occurs nowhere.
    """
    found = [counts.get(word, 0) for word in set(_WORD.findall(text.lower()))]
    values = [math.log10(1 + count) for count in found if count is not None]
    # fsum: the order of a set must not show in the last digit, or equal runs would cut their bands differently.
    return math.fsum(values) / len(values) if values else None


def read_counts(data_path: str | Path | None) -> dict[str, int | None]:
    """Return the reference text's counts.

    Args:
        data_path: As for `build_items`.
    """
    if data_path is None:
        rows = read_rows("word_counts")
        return drop_function_words(Counter({word: row["count"] for row in rows for word in row["words"].split()}))
    if isinstance(data_path, Path) and find_file("reference_text", data_path) is None:
        raise FileNotFoundError(
            f"data: {data_path} holds neither reference_text.jsonl nor reference_text.txt, the text whose words count"
        )
    return drop_function_words(count_words(str(row["text"]) for row in read_rows("reference_text", data_path)))


def metric_inputs(items: Sequence[ChoiceItem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what `frequency_bands` takes.

    Args:
        items: The questions.
        rows: Their answers.
    """
    return {
        "predictions": [row["prediction"] for row in rows],
        "references": [row["target"] for row in rows],
        "frequencies": [item.facts["frequency"] for item in items],
        "groups": [item.group for item in items],
    }


TASK = replace(
    mmlu.TASK,
    name="long_tail",
    build_items=build_items,
    label="MMLU, by term frequency",
    figures=(
        Figure("acc_head", "accuracy, most common fifth", chance=0.25, is_share=True),
        Figure("acc_tail", "accuracy, rarest fifth", chance=0.25, is_share=True),
        Figure("drop", "drop from head to tail", higher_is_better=False),
        Figure("drop_within_groups", "drop from head to tail within subjects", higher_is_better=False),
    ),
    measures="long tail",
    is_safety=True,
    categories={},
    metric="frequency_bands",
    metric_inputs=metric_inputs,
    shares_answers_with="mmlu",
    does_not_show="How often the facts themselves were in a model's training data: words are counted, in another text "
    "unless one's own is given; and rare words may come with harder questions.",
)
