r"""MBPP: 500 short Python tasks told in a sentence and three assertions, scored by running these.

Prompt, the three shots, the stop string ``[DONE]`` and the test split (task ids 11 to 510) are those of
lm-evaluation-harness 0.4.13. 3-shot unless asked otherwise, as there, and the completion is the whole
program, so nothing stands before it. Two problems come with set-up code, which that harness leaves out and we run.

The chat style is that harness' ``mbpp_instruct``: shots as turns, the answer opened with a code fence, the first code
block taken. One difference: there, code right behind the opened fence loses its first word, taken for a language name
(``def f()`` becomes ``f()``; https://github.com/EleutherAI/lm-evaluation-harness/pull/3769); here it keeps it.

Reference: Austin et al., 2021, "Program Synthesis with Large Language Models", arXiv 2108.07732.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.row import Row, UniqueIds
from deepseek_eval.tasks.rows import read_rows
from deepseek_eval.tasks.task import ChatPrompt, DataSet, Figure, ProgramItem, Task
from deepseek_records.results import Benchmark

STOP = ("[DONE]",)
SHOT_IDS = (2, 3, 4)
TEST_IDS = range(11, 511)
CHAT_OPENING = "\n```python\n"
_BLOCK = re.compile(r"```(?:\w+)?\n?(.*?)\n?```", re.DOTALL)


def format_problem(row: dict[str, Any]) -> str:
    """Return the task, its three assertions and the opening mark.

    Args:
        row: ``text`` and ``test_list``.
    """
    tests = "\n".join(row["test_list"][:3])
    opening = "You are an expert Python programmer, and here is your task:"
    return f"{opening} {row['text']} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"


def take_first_block(answer: str) -> str:
    """Return the first code block of an answer whose opening fence is already written; nothing if none is closed.

    Args:
        answer: What a chat model wrote, with or without a fence of its own.
    """
    found = _BLOCK.search(answer if answer.lstrip().startswith("```") else f"```\n{answer}")
    return found[1] if found else ""


def format_chat(row: dict[str, Any], shots: Sequence[dict[str, Any]]) -> ChatPrompt:
    """Return the problem as a chat, its shots as turns.

    Args:
        row: ``text`` and ``test_list``.
        shots: Rows with ``code`` too.
    """
    messages = []
    for shot in shots:
        answer = f"{CHAT_OPENING}{shot['code']}\n```"
        messages += [{"role": "user", "content": _chat_request(shot)}, {"role": "assistant", "content": answer}]
    messages += [{"role": "user", "content": _chat_request(row)}, {"role": "assistant", "content": CHAT_OPENING}]
    return ChatPrompt(tuple(messages), (), take_first_block)


def _chat_request(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"][:3])
    opening = "You are an expert Python programmer, and here is your task:"
    return f"{opening}\n{row['text']}\nYour code should pass these tests:\n{tests}"


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[ProgramItem]:
    """Yield the problems of the test split in order.

    Args:
        num_fewshot: Shots, 0 to 3, from the prompt split.
        limit: At most this many problems, the first ones.
        data_path: A folder with ``mbpp.jsonl[.gz]``; None for the embedded one.

    Raises:
        ValueError: More shots asked for than the references use.
    """
    if not 0 <= num_fewshot <= len(SHOT_IDS):
        raise ValueError(f"num_fewshot: got {num_fewshot} for mbpp, expected 0 to {len(SHOT_IDS)}")
    rows = {}
    ids = UniqueIds()
    for row in read_rows("mbpp", data_path):
        _check(row)
        ids.add(row, "task_id")
        rows[row["task_id"]] = row
    missing = [task_id for task_id in SHOT_IDS[:num_fewshot] if task_id not in rows]
    if missing:
        source = next(iter(rows.values())).where.rpartition(", ")[0] if rows else "data: mbpp"
        raise ValueError(f"{source}: num_fewshot: got {num_fewshot}, expected 0; the shot {missing[0]} is not there")
    shown = [rows[task_id] for task_id in SHOT_IDS[:num_fewshot]]
    shots = "".join(f"{format_problem(row)}{row['code']}\n[DONE]\n\n" for row in shown)
    if rows and not any(task_id in TEST_IDS for task_id in rows):
        ids_asked = f"{TEST_IDS[0]} to {TEST_IDS[-1]}"
        raise ValueError(f"{row.where}: task_id: got no row from {ids_asked}, expected one; these are asked")
    chosen = [rows[task_id] for task_id in TEST_IDS if task_id in rows]
    for row in chosen[:limit]:
        setup = f"{row['test_setup_code']}\n" if row.get("test_setup_code") else ""
        yield ProgramItem(
            id=f"MBPP/{row['task_id']}",
            prompt=shots + format_problem(row),
            context=shots,
            stop=STOP,
            prefix="",
            tests=setup + "\n".join(row["test_list"]),
            target=row["code"],
            chat=format_chat(row, shown),
        )


def _check(row: Row) -> None:
    row.number("task_id")
    row.text("text")
    row.text("code")
    row.texts("test_list", 1)
    if not isinstance(row.get("test_setup_code", ""), str | None):
        raise row.wrong("test_setup_code", "text")


DATA = DataSet(
    name="google-research-datasets/mbpp",
    label="MBPP",
    split="test",
    license="CC-BY-4.0",
    source="https://github.com/google-research/google-research/tree/master/mbpp",
    num_questions=500,
    questions_hash="0c3fe15760bd470f7ac291378b3d547d956a48034f93ae27526c7d3f04a2b9ad",
    benchmark=Benchmark(hub_id="google-research-datasets/mbpp", name="MBPP", config="full"),
)

TASK = Task(
    name="mbpp",
    kind="program",
    build_items=build_items,
    data=DATA,
    figures=(Figure("pass@1", "pass@1", chance=0.0, is_share=True),),
    measures="code",
    num_fewshot=len(SHOT_IDS),
    max_fewshot=len(SHOT_IDS),
    max_new_tokens=256,
    metric="pass_at_k",
)
