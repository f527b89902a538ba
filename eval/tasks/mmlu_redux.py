"""MMLU-Redux: MMLU's questions looked through again, answered by writing a letter.

Prompt and pattern are lm-evaluation-harness 0.4.13's ``mmlu_redux_generative``: no shots, and the first capital A to D
in the text is the answer. The data is not shipped; rows whose answer is known to be wrong are to be mended or left out
before, as in the copy that harness reads. "Answer: B" is read as A, here as there.

Reference: Gema et al., 2024, "Are We Done with MMLU?", arXiv 2406.04127.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from deepseek_eval.tasks.letter_answers import letter_inputs
from deepseek_eval.tasks.mmlu import LETTERS, SUBJECT_CATEGORIES, format_shots
from deepseek_eval.tasks.row import Row
from deepseek_eval.tasks.rows import read_rows
from deepseek_eval.tasks.task import CompletionItem, DataSet, Figure, Task

ANSWER = "([ABCD])"
STOP = ("</s>",)
WHERE = (
    "pass --data mmlu_redux=fxmarty/mmlu-redux-2.0-ok (a configuration for each subject), or mmlu_redux=PATH with "
    "mmlu_redux.jsonl, whose rows have a column subject"
)
_REQUEST = (
    "Please respond with the correct letter (A, B, C or D) without any additional comments, only the correct letter:"
)


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[CompletionItem]:
    """Yield the questions in the file's order.

    Args:
        num_fewshot: Ignored: questions are put without examples.
        limit: At most this many questions of each subject.
        data_path: A file or folder with ``mmlu_redux.jsonl[.gz]``; or a Hub id, of one subject or of all.

    Raises:
        FileNotFoundError: No data was given.
        ValueError: A row that is not such a question.
    """
    seen: dict[str, int] = defaultdict(int)
    for row in _read(data_path):
        subject = row.text("subject")
        question = row.text("question").strip()
        choices = row.texts("choices", len(LETTERS), len(LETTERS))
        answer = row.index("answer", len(LETTERS))
        seen[subject] += 1
        if limit is not None and seen[subject] > limit:
            continue
        context = format_shots(subject, [])
        lettered = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=True))
        yield CompletionItem(
            id=f"{subject}/{seen[subject] - 1}",
            prompt=f"{context}{question}{lettered}\n{_REQUEST}",
            context=context,
            target=LETTERS[answer],
            group=subject,
            stop=STOP,
            is_request=False,
        )


def _read(data_path: str | Path | None) -> Iterator[Row]:
    """The rows; on the Hub each subject is a configuration of its own, and rows do not name it."""
    if not isinstance(data_path, str):
        yield from read_rows("mmlu_redux", data_path, where=WHERE)
        return
    repository, _, wanted = data_path.partition(":")
    for subject in [wanted] if wanted else list(SUBJECT_CATEGORIES):
        for row in read_rows("mmlu_redux", f"{repository}:{subject}"):
            yield Row({"subject": subject, **row}, row.where)


TASK = Task(
    name="mmlu_redux",
    kind="completion",
    build_items=build_items,
    data=DataSet(
        name="fxmarty/mmlu-redux-2.0-ok",
        label="MMLU-Redux",
        split="test",
        license="CC-BY-4.0",
        source="https://huggingface.co/datasets/fxmarty/mmlu-redux-2.0-ok",
    ),
    figures=(Figure("acc", "accuracy", is_share=True),),
    measures="knowledge",
    categories=SUBJECT_CATEGORIES,
    max_new_tokens=256,
    metric_inputs=letter_inputs(ANSWER, SUBJECT_CATEGORIES),
)
