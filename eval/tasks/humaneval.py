r"""HumanEval: 164 Python functions to complete from signature and docstring, scored by running their tests.

Prompt, stop strings and program are lm-evaluation-harness 0.4.13's: the raw prompt without stripping, and a cut at the
first of ``\nclass``, ``\ndef``, ``\n#``, ``\nif``, ``\nprint`` (OpenAI's paper names the same five).

The chat style is that harness' ``humaneval_instruct``: the model is asked in words, its answer is opened with a code
fence that repeats signature and docstring, and what it adds before the closing fence is the completion.

Reference: Chen et al., 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_eval.tasks.row import Row, UniqueIds
from deepseek_eval.tasks.rows import read_rows
from deepseek_eval.tasks.task import ChatPrompt, DataSet, Figure, ProgramItem, Task
from deepseek_records.results import Benchmark, Published

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

FENCE = "```"


def take_before_fence(answer: str) -> str:
    """Return what stands before the closing code fence, all of it where there is none.

    Args:
        answer: What a chat model added to its opened code block.
    """
    return answer.split(FENCE)[0]


def format_chat(prompt: str) -> ChatPrompt:
    """Return the problem as a chat.

    Args:
        prompt: Signature and docstring.
    """
    request = "Write a solution to the following problem and make sure that it passes the tests:\n"
    request += f"```python\n{prompt}\n```\n"
    opening = f"Here is the completed function:\n```python\n{prompt}\n"
    messages = ({"role": "user", "content": request}, {"role": "assistant", "content": opening})
    return ChatPrompt(messages, STOP, take_before_fence)


def find_helpers(row: dict[str, Any]) -> str:
    """Return the functions of the prompt that the tests call (`poly`, `encode_cyclic`, `encode_shift`), with imports.

    Three problems check a completion with a function that the prompt gives. Repeated before the tests, these are the
    prompt's own: a completion that defines its own does not choose what it is checked with.

    Args:
        row: ``prompt``, ``entry_point`` and ``test``.
    """
    if row["prompt"].count("def ") < 2:
        return ""
    body = ast.parse(row["prompt"]).body
    called = {node.id for node in ast.walk(ast.parse(row["test"])) if isinstance(node, ast.Name)}
    helpers = [node for node in body if isinstance(node, ast.FunctionDef) and node.name != row["entry_point"]]
    helpers = [node for node in helpers if node.name in called]
    if not helpers:
        return ""
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    return "".join(f"{ast.unparse(node)}\n" for node in [*imports, *helpers])


def _find_helpers(row: Row) -> str:
    try:
        return find_helpers(row)
    except SyntaxError as error:
        raise ValueError(f"{row.where}: prompt or test: got {error.msg}, expected Python") from None


def build_items(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[ProgramItem]:
    """Yield the problems in order.

    Args:
        num_fewshot: Ignored: HumanEval has no examples to show, and the references run it 0-shot.
        limit: At most this many problems, the first ones.
        data_path: A folder with ``humaneval.jsonl[.gz]``; None for the embedded one.
    """
    ids = UniqueIds()
    for index, row in enumerate(read_rows("humaneval", data_path)):
        if limit is not None and index >= limit:
            return
        for name in ("task_id", "prompt", "test", "entry_point"):
            row.text(name)
        if not isinstance(row.get("canonical_solution"), str):
            raise row.wrong("canonical_solution", "text")
        ids.add(row, "task_id")
        yield ProgramItem(
            id=row["task_id"],
            prompt=row["prompt"],
            stop=STOP,
            prefix=row["prompt"],
            tests=f"{_find_helpers(row)}{row['test']}\ncheck({row['entry_point']})",
            target=row["canonical_solution"],
            chat=format_chat(row["prompt"]),
        )


DATA = DataSet(
    name="openai/openai_humaneval",
    label="HumanEval",
    split="test",
    license="MIT",
    source="https://github.com/openai/human-eval",
    num_questions=164,
    questions_hash="61cbecfce7f38233f80c0f11fcd4b730134b916397e515d64c1eb2f943f763e2",
    benchmark=Benchmark(hub_id="openai/openai_humaneval", name="HumanEval"),
)

TASK = Task(
    name="humaneval",
    kind="program",
    build_items=build_items,
    data=DATA,
    figures=(
        Figure(
            "pass@1",
            "pass@1",
            chance=0.0,
            is_share=True,
            published=(
                Published(by="DeepSeek-V3 base", value=0.652, remark="0-shot"),
                Published(by="the article", value=0.723, remark="see note"),
            ),
        ),
    ),
    measures="code",
    max_new_tokens=1024,
    metric="pass_at_k",
)
