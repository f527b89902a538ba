r"""MBPP: 500 short Python tasks told in a sentence and three assertions, scored by running these.

Prompt, the three shots, the stop string ``[DONE]`` and the test split (task ids 11 to 510) are those of
lm-evaluation-harness 0.4.13. Surprising: 3-shot unless asked otherwise, as there, and the completion is the whole
program, so nothing stands before it. Two problems come with set-up code, which that harness leaves out and we run.

Reference: Austin et al., 2021, "Program Synthesis with Large Language Models", arXiv 2108.07732.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.rows import read_rows
from deepseek_eval.tasks.task import ProgramItem, Task

STOP = ("[DONE]",)
SHOT_IDS = (2, 3, 4)
TEST_IDS = range(11, 511)


def format_problem(row: dict[str, Any]) -> str:
    """Return the task, its three assertions and the opening mark.

    Args:
        row: ``text`` and ``test_list``.
    """
    tests = "\n".join(row["test_list"][:3])
    opening = "You are an expert Python programmer, and here is your task:"
    return f"{opening} {row['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"


def build_items(num_fewshot: int, limit: int | None, data_path: Path | None) -> Iterator[ProgramItem]:
    """Yield the problems of the test split in order.

    Args:
        num_fewshot: Shots, 0 to 3, from the prompt split.
        limit: At most this many problems, the first ones.
        data_path: A folder with ``mbpp.jsonl[.gz]``; None for the embedded one.

    Raises:
        ValueError: More shots asked for than the references use.
    """
    if not 0 <= num_fewshot <= len(SHOT_IDS):
        raise ValueError(f"num_fewshot = {num_fewshot} for mbpp, allowed is 0 to {len(SHOT_IDS)}")
    rows = {row["task_id"]: row for row in read_rows("mbpp", data_path)}
    shots = "".join(f"{format_problem(rows[i])}{rows[i]['code']}\n[DONE]\n\n" for i in SHOT_IDS[:num_fewshot])
    chosen = [rows[task_id] for task_id in TEST_IDS if task_id in rows]
    for row in chosen[:limit]:
        setup = f"{row['test_setup_code']}\n" if row["test_setup_code"] else ""
        yield ProgramItem(
            id=f"MBPP/{row['task_id']}",
            prompt=shots + format_problem(row),
            stop=STOP,
            prefix="",
            tests=setup + "\n".join(row["test_list"]),
            target=row["code"],
        )


TASK = Task(
    name="mbpp",
    kind="program",
    build_items=build_items,
    dataset="google-research-datasets/mbpp",
    split="test",
    licence="CC-BY-4.0",
    source="https://github.com/google-research/google-research/tree/master/mbpp",
    num_fewshot=3,
    max_new_tokens=256,
)
