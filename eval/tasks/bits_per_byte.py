"""Bits per byte of any text: how well a model predicts it, whatever its tokenizer.

The text is the user's own (``--data``), read as the training stages read theirs: a file, a folder or a Hub id. The
figure equals a stage's held-out ``bits_per_byte`` on the same documents and windows: every token is scored once, the
end token too, after the begin token.

lm-evaluation-harness' tasks with this metric (``loglikelihood_rolling``: wikitext, the Pile) differ in two points.
They score no end token, and their windows do not overlap: the first token of each is predicted from a single one.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.task import DataSet, Figure, Task, TextItem
from deepseek_records.document_files import load_documents

FIGURES = (Figure("bits_per_byte", "bits per byte (lower is better)", higher_is_better=False),)
DOES_NOT_SHOW = "Whether this text, or one like it, was in the training data; and what the model knows or can do."


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[TextItem]:
    """Yield the documents of a text.

    Args:
        num_fewshot: Without effect: a text has no shots.
        limit: At most this many documents.
        data_path: The text.

    Raises:
        ValueError: No text is named, or it is empty.
    """
    if data_path is None:
        raise ValueError(
            "data: got none for bits_per_byte, expected a text: --data FILE, or --data bits_per_byte=FILE beside "
            "other tasks"
        )
    return documents_of("bits_per_byte", data_path, limit)


def documents_of(
    name: str, source: str | Path, limit: int | None, *, split: str = "all", column: str | None = None
) -> Iterator[TextItem]:
    """Yield a text's documents, numbered.

    Args:
        name: The task's name.
        source: As `deepseek_records.document_files.load_documents` takes it, as are the next two.
        limit: At most this many documents.
        split: The split.
        column: The column with the text.
    """
    for index, text in enumerate(load_documents(source, split, column=column)[:limit]):
        yield TextItem(id=f"{name}/{index}", prompt=text, group=name)


def metric_inputs(items: Sequence[TextItem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the metric takes.

    Args:
        items: The documents.
        rows: What the model made of them.
    """
    return {
        "predictions": [row["loglikelihood"] for row in rows],
        "references": [row["num_bytes"] for row in rows],
    }


TASK = Task(
    name="bits_per_byte",
    kind="text",
    build_items=build_items,
    data=DataSet(name="own text", label="own text", split="", license="not stated", source="own data"),
    figures=FIGURES,
    measures="language",
    metric="bits_per_byte",
    metric_inputs=metric_inputs,
    does_not_show=DOES_NOT_SHOW,
)
