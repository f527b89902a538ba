"""MMLU-Pro: questions with up to ten options, answered after thinking step by step.

Prompt, shots, stop string and the pattern that takes the answer are lm-evaluation-harness 0.4.13's ``mmlu_pro``: the
first five examples of the category, 2,048 tokens, ``answer is (X)``. The data is not shipped. That pattern
wants the words "answer is", so a model that answers with a bare letter scores nothing. In a chat, the instruction is
the system's turn and each example a question and its answer.

Reference: Wang et al., 2024, "MMLU-Pro", arXiv 2406.01574.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from deepseek_eval.tasks.letter_answers import LETTERS, letter_inputs
from deepseek_eval.tasks.row import Row
from deepseek_eval.tasks.rows import check_folder, read_rows
from deepseek_eval.tasks.task import CompletionItem, DataSet, Figure, Task
from deepseek_records.results import Benchmark

MAX_SHOTS = 5
ANSWER = r"answer is \(?([ABCDEFGHIJ])\)?"
STOP = ("Question:",)
WHERE = (
    "pass --data mmlu_pro=TIGER-Lab/MMLU-Pro, or mmlu_pro=FOLDER with mmlu_pro_test.jsonl and, for shots, "
    "mmlu_pro_validation.jsonl"
)
_THINK = "Let's think step by step."


def format_question(row: Row) -> str:
    """Return question, lettered options and the opening of the answer.

    Args:
        row: ``question`` and ``options``.
    """
    options = "".join(f"{letter}. {option.strip()}\n" for letter, option in zip(LETTERS, row["options"], strict=False))
    return f"Question:\n{row['question']}\nOptions:\n{options}Answer: {_THINK}"


def format_shot(row: Row) -> str:
    """Return an answered example.

    Args:
        row: A row with ``cot_content``.
    """
    return f"{format_question(row)} {_reasoning(row)}\n\n"


def _reasoning(row: Row) -> str:
    return str(row["cot_content"]).replace(f"A: {_THINK} ", "")


def format_turns(instruction: str, shots: Sequence[Row]) -> tuple[dict[str, str], ...]:
    """Return instruction and examples as turns of a chat.

    Args:
        instruction: What stands before the examples.
        shots: Rows with ``cot_content``.
    """
    turns = [{"role": "system", "content": instruction}]
    for row in shots:
        turns += [
            {"role": "user", "content": format_question(row)},
            {"role": "assistant", "content": _reasoning(row)},
        ]
    return tuple(turns)


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[CompletionItem]:
    """Yield the questions in the file's order.

    Args:
        num_fewshot: Shots from the validation split, 0 to 5.
        limit: At most this many questions of each category.
        data_path: A folder with ``mmlu_pro_test`` and ``mmlu_pro_validation``, or a Hub id.

    Raises:
        FileNotFoundError: No data was given.
        ValueError: A row that is not such a question, or a category without enough examples.
    """
    check_folder(data_path, "mmlu_pro_test and mmlu_pro_validation")
    shots: dict[str, list[Row]] = defaultdict(list)
    for row in read_rows("mmlu_pro_validation", data_path, where=WHERE) if num_fewshot else ():
        _check(row)
        row.text("cot_content")
        shots[row["category"]].append(row)
    seen: dict[str, int] = defaultdict(int)
    for row in read_rows("mmlu_pro_test", data_path, where=WHERE):
        _check(row)
        category = row["category"]
        if len(shots[category]) < num_fewshot:
            raise ValueError(
                f"{row.where}: num_fewshot: got {num_fewshot}, expected at most {len(shots[category])}; "
                f"mmlu_pro_validation has no more examples of {category!r}"
            )
        seen[category] += 1
        if limit is not None and seen[category] > limit:
            continue
        instruction = (
            f"The following are multiple choice questions (with answers) about {category}. Think step by step and "
            'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n'
        )
        shown = shots[category][:num_fewshot]
        context = instruction + "".join(format_shot(shot) for shot in shown)
        yield CompletionItem(
            id=f"{category}/{seen[category] - 1}",
            prompt=context + format_question(row),
            context=context,
            target=row["answer"],
            group=category,
            stop=STOP,
            is_request=False,
            chat_context=format_turns(instruction, shown),
        )


def _check(row: Row) -> None:
    row.text("question")
    row.text("category")
    options = row.texts("options", 2, len(LETTERS))
    row.one_of("answer", LETTERS[: len(options)])


TASK = Task(
    name="mmlu_pro",
    kind="completion",
    build_items=build_items,
    data=DataSet(
        name="TIGER-Lab/MMLU-Pro",
        label="MMLU-Pro",
        split="test",
        license="MIT",
        source="https://huggingface.co/datasets/TIGER-Lab/MMLU-Pro",
        benchmark=Benchmark(hub_id="TIGER-Lab/MMLU-Pro", name="MMLU-Pro", task_id="mmlu_pro"),
    ),
    figures=(Figure("acc", "accuracy", is_share=True),),
    measures="knowledge",
    num_fewshot=MAX_SHOTS,
    max_fewshot=MAX_SHOTS,
    max_new_tokens=2048,
    metric_inputs=letter_inputs(ANSWER),
)
