"""Scores completions made elsewhere: OpenAI's JSON Lines, ``task_id`` and ``completion`` a line.

Called by ``deepseek-moe evaluate --samples``. It works the other way round as well: the ``samples_<task>.jsonl``
that the harness writes has these two keys in every row, so ``evaluate_functional_correctness`` reads it unchanged.
"""

import json
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_eval.answers.prompt_style import write_prompts
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.questions import hash_question, read_questions
from deepseek_eval.run_summary import data_rows, result_rows
from deepseek_eval.runners.program import choose_k
from deepseek_eval.sandbox.client import describe_protection
from deepseek_eval.settings import EvalSettings, name_data
from deepseek_eval.tasks.catalogue import find_task
from deepseek_eval.tasks.task import ProgramItem
from deepseek_records.row_files import json_type, read_table
from deepseek_records.run_folder import RunFolder, write_json, write_text
from deepseek_records.summary import Summary

# How many names of missing problems a message lists.
_NUM_NAMED = 3


def read_samples(path: str | Path, items: list[ProgramItem], beyond_limit: Collection[str] = ()) -> list[list[str]]:
    """Return each problem's completions, in the items' order.

    Args:
        path: The samples file.
        items: The problems it must cover.
        beyond_limit: Problems that it may cover; their lines are passed over.

    Raises:
        FileNotFoundError: There is no such file.
        IsADirectoryError: It is a folder.
        ValueError: A line is not a sample, a problem is missing or unknown, or one sample occurs twice.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"samples: {path} is a folder, expected a file of JSON lines")
    if not path.is_file():
        raise FileNotFoundError(f"samples: {path} does not exist")
    known = {item.id for item in items}
    completions: dict[str, list[str]] = defaultdict(list)
    seen = set()
    for row, where in read_table(path, "samples"):
        _check_row(row, where)
        name = row["task_id"]
        if name in beyond_limit:
            continue
        if name not in known:
            raise ValueError(f"{where}: task_id: got {name!r}, expected a problem of the task")
        # Files of ours number a problem's samples; OpenAI's do not, and there a repeated line is one more sample.
        if "sample" in row and (name, row["sample"]) in seen:
            raise ValueError(f"{where}: sample: got {row['sample']} of {name} again, expected each once")
        seen.add((name, row.get("sample")))
        completions[name].append(row["completion"])
    missing = [item.id for item in items if item.id not in completions]
    if missing:
        more = ", ..." if len(missing) > _NUM_NAMED else ""
        raise ValueError(
            f"samples: {path} lacks {len(missing)} of {len(items)} problems ({', '.join(missing[:_NUM_NAMED])}{more})"
        )
    return [completions[item.id] for item in items]


def _check_row(row: dict[str, Any], where: str) -> None:
    for name in ("task_id", "completion"):
        if not isinstance(row.get(name), str):
            got = json_type(row[name]) if name in row else f"no {name}"
            raise ValueError(f"{where}: {name}: got {got}, expected text")
    if not isinstance(row.get("sample", 0), int) or isinstance(row.get("sample"), bool):
        raise ValueError(f"{where}: sample: got {json_type(row['sample'])}, expected a whole number")


def score_samples(
    path: str | Path,
    task_name: str,
    *,
    output: str | Path,
    k: tuple[int, ...] | None = None,
    limit: int | None = None,
    data_path: str | Path | dict[str, str] | None = None,
    allow_weak_sandbox: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Run the tests on a samples file and write a run folder, as `evaluate_model` does for a model.

    Args:
        path: The samples file.
        task_name: A task whose answers are programs.
        output: The run folder to write.
        k: Values of k for pass@k; None takes 1, or 1, 10 and 100 where a problem has several samples.
        limit: Only the task's first problems.
        data_path: As for `evaluate_model`.
        allow_weak_sandbox: Run programs even where the machine offers less than the sandbox's minimum.
        overwrite: Replace a run that is in the way.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: The task takes no programs, or the file does not cover it.
    """
    task = find_task(task_name)
    if task.kind != "program":
        raise ValueError(f"samples: task {task.name} is not answered by programs")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1, or none for all")
    if any(value < 1 for value in k or ()):
        raise ValueError(f"k: got {min(k)}, expected at least 1")
    questions = read_questions(task, EvalSettings(tasks=(task.name,), data_path=data_path))
    task, every = questions.task, questions.items
    items = every[:limit]
    rows = read_samples(path, items, {item.id for item in every} - {item.id for item in items})
    k = choose_k(max(map(len, rows))) if k is None else k
    settings = {
        "samples": str(path),
        "task": task.name,
        "k": list(k),
        "limit": limit,
        "data_path": name_data(data_path),
    }
    run = RunFolder.create(output, settings, command="evaluate", overwrite=overwrite)
    with tqdm(total=sum(map(len, rows)), desc=f"evaluate {task.name}: run", unit="program") as bar:
        scores = load_metric("pass_at_k").compute(
            predictions=[[item.program(text) for text in row] for item, row in zip(items, rows, strict=True)],
            references=[item.tests for item in items],
            k=sorted({1, *k}),  # The headline is pass@1.
            allow_weak_sandbox=allow_weak_sandbox,
            on_result=bar.update,
        )
    outcomes = scores.pop("samples")
    lines = [
        {
            "id": item.id,
            "task_id": item.id,
            "sample": index,
            "prediction": text,
            "completion": text,
            **outcome,
            "question_hash": hash_question(item),
        }
        for item, row, row_outcomes in zip(items, rows, outcomes, strict=True)
        for index, (text, outcome) in enumerate(zip(row, row_outcomes, strict=True))
    ]
    write_text(run.path / f"samples_{task.name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    write_prompts(run, task, items)
    results = {"model": None, "tasks": {task.name: {**scores, "sandbox": describe_protection()}}}
    write_json(run.path / "results.json", results)
    counts = {task.name: scores["n"]}
    run.finish(Summary(stage="evaluate", results=result_rows(task, scores), data=data_rows([task], counts)))
    return results
