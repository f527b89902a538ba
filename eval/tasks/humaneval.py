r"""HumanEval: 164 Python functions to complete from signature and docstring, scored by running their tests.

Prompt, stop strings and program are lm-evaluation-harness 0.4.13's: the raw prompt without stripping, and a cut at the
first of ``\nclass``, ``\ndef``, ``\n#``, ``\nif``, ``\nprint`` (OpenAI's paper names the same five).

Reference: Chen et al., 2021, "Evaluating Large Language Models Trained on Code", arXiv 2107.03374.
"""

from collections.abc import Iterator
from pathlib import Path

from deepseek_eval.tasks.rows import read_rows
from deepseek_eval.tasks.task import ProgramItem, Task

STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


def build_items(num_fewshot: int, limit: int | None, data_path: Path | None) -> Iterator[ProgramItem]:
    """Yield the problems in order.

    Args:
        num_fewshot: Ignored: HumanEval has no examples to show, and the references run it 0-shot.
        limit: At most this many problems, the first ones.
        data_path: A folder with ``humaneval.jsonl[.gz]``; None for the embedded one.
    """
    for index, row in enumerate(read_rows("humaneval", data_path)):
        if limit is not None and index >= limit:
            return
        yield ProgramItem(
            id=row["task_id"],
            prompt=row["prompt"],
            stop=STOP,
            prefix=row["prompt"],
            tests=f"{row['test']}\ncheck({row['entry_point']})",
            target=row["canonical_solution"],
        )


TASK = Task(
    name="humaneval",
    kind="program",
    build_items=build_items,
    dataset="openai/openai_humaneval",
    split="test",
    licence="MIT",
    source="https://github.com/openai/human-eval",
    max_new_tokens=1024,
)
