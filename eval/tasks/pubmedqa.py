"""PubMedQA: does a paper's abstract, without its conclusion, answer the paper's own question with yes, no or maybe?

The 500 test questions of the expert-labeled set, formatted as in lm-evaluation-harness (which asks all 1,000):
abstract, question, and the likeliest of the three words. The abstract stands in the prompt, so an answer needs reading
and not knowledge alone.

Reference: Jin et al., 2019, "PubMedQA: A Dataset for Biomedical Research Question Answering", arXiv 1909.06146.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from deepseek_eval.tasks.row import Row, UniqueIds
from deepseek_eval.tasks.rows import read_rows
from deepseek_eval.tasks.task import ChoiceItem, DataSet, Figure, Task

ANSWERS = ("yes", "no", "maybe")


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[ChoiceItem]:
    """Yield the questions in the file's order.

    Args:
        num_fewshot: Ignored: no examples are shown.
        limit: At most this many questions, the first ones.
        data_path: A folder with ``pubmedqa.jsonl[.gz]``, the file, or a Hub id; None for the embedded questions.

    Raises:
        ValueError: A row that is not such a question.
    """
    ids = UniqueIds()
    for row in islice(read_rows("pubmedqa", data_path), limit):
        _check(row)
        ids.add(row, "id")
        abstract = "\n".join(row["contexts"])
        yield ChoiceItem(
            id=f"pubmedqa/{row['id']}",
            prompt=f"Abstract: {abstract}\nQuestion: {row['question']}\nAnswer:",
            choices=tuple(f" {answer}" for answer in ANSWERS),
            target=ANSWERS.index(row["answer"]),
            group="pubmedqa",
        )


def _check(row: Row) -> None:
    row.text("id")
    row.text("question")
    row.texts("contexts", 1)
    row.one_of("answer", ANSWERS)


TASK = Task(
    name="pubmedqa",
    kind="continuation",
    build_items=build_items,
    data=DataSet(
        name="qiaojin/PubMedQA",
        label="PubMedQA",
        split="test",
        license="MIT",
        source="https://github.com/pubmedqa/pubmedqa",
        num_questions=500,
        questions_hash="9b929013721dbfdb50d6b4ed7aa3ea491ec2ce542435f82cd15521f359d01548",
    ),
    figures=(Figure("acc", "accuracy", chance=1 / len(ANSWERS), is_share=True),),
    measures="knowledge",
    does_not_show="Medical knowledge alone: the abstract stands in the prompt, and always yes is right in 0.552 of "
    "the questions.",
)
