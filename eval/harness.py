"""Scores a model on benchmarks and writes a run folder: results, and every answer beside its target.

Called by ``deepseek-moe evaluate`` and the demo. Each task appends its answers to ``samples_<task>.partial.jsonl``
as they come; a run that was interrupted reads that file and goes on with what is missing. Surprising: batches are
planned over all items before the finished ones are left out, so that the numbers do not depend on where a run
stopped.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_eval.answers.generation import EncodedPrompt, SamplingSettings, complete_batches, plan_prompts
from deepseek_eval.answers.loglikelihood import encode_items, plan_batches, score_batches, supports_shared_prefix
from deepseek_eval.answers.prompt_style import apply_style, check_style, take_code, write_prompts
from deepseek_eval.answers.samples_writer import AnswerFile
from deepseek_eval.metrics.loading import load_metric, score_answers
from deepseek_eval.model_loading import LoadedModel, load_model
from deepseek_eval.runners.text import run_completion_task, run_continuation_task
from deepseek_eval.sandbox.client import describe_protection
from deepseek_eval.tasks.catalogue import find_task
from deepseek_eval.tasks.rows import find_source
from deepseek_eval.tasks.task import Task
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.summary import DataUse, Result, Summary

logger = logging.getLogger(__name__)
# What makes the figures comparable: whose prompts, stop strings and aggregation they follow.
HARNESS = "deepseek-moe, prompts and aggregation of lm-evaluation-harness 0.4.13"


def evaluate_model(
    model_name_or_path: str | Path,
    *,
    tasks: Sequence[str] = ("mmlu", "humaneval"),
    num_fewshot: int | None = None,
    limit: int | dict[str, int] | None = None,
    batch_size: int = 32,
    output: str | Path,
    max_new_tokens: int | None = None,
    num_samples: int = 1,
    temperature: float = 0.0,
    top_p: float = 1.0,
    prompt_style: str = "base",
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    experts_implementation: str | None = None,
    data_path: str | Path | dict[str, str] | None = None,
    allow_weak_sandbox: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Score a causal language model and write ``results.json`` and ``samples_<task>.jsonl``.

    Args:
        model_name_or_path: Checkpoint folder, run folder of ours, or Hub id.
        tasks: Names from the catalogue.
        num_fewshot: Shots for tasks that have them (MMLU: 0 to 5, MBPP: 0 to 3); None takes each reference's own (0
            and 3).
        limit: At most this many items (MMLU: per subject), for all tasks or by task name; None for all.
        batch_size: Questions, or prompts, a batch.
        output: The run folder to write.
        max_new_tokens: Length limit of a completion; None takes the task's (HumanEval: 1024).
        num_samples: Completions a problem.
        temperature: 0 is greedy.
        top_p: Nucleus share for sampling.
        prompt_style: ``base`` or, for programs, ``chat``: through the tokenizer's chat template.
        seed: Seed for sampling.
        dtype: As `load_model` takes it, as are the next four.
        device: Torch device.
        trust_remote_code: Run the checkpoint's own code.
        adapter: PEFT adapter.
        experts_implementation: How MoE layers run.
        data_path: A folder with the user's own data files, named as the embedded ones; or by task name a folder, a
            file or a Hub id.
        allow_weak_sandbox: Run programs even where the machine offers less than the sandbox's minimum.
        overwrite: Replace a run that is in the way.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: An unknown task or setting, a model whose scores would mean nothing.
        FileNotFoundError: Model or data are missing.
    """
    chosen = [find_task(name) for name in dict.fromkeys(tasks)]
    settings = {key: value for key, value in locals().items() if key not in ("chosen", "overwrite", "output")}
    settings |= {"tasks": [task.name for task in chosen], "model_name_or_path": str(model_name_or_path)}
    settings["data_path"] = name_data(data_path)
    _check_settings(settings)
    check_style(prompt_style, chosen)
    _check_data(chosen, settings)
    started = time.monotonic()
    run = RunFolder.create(output, settings, command="evaluate", seed=seed, overwrite=overwrite)
    options = {
        key: settings[key] for key in ("dtype", "device", "trust_remote_code", "adapter", "experts_implementation")
    }
    loaded = load_model(model_name_or_path, **options)
    results: dict[str, Any] = {"model": str(model_name_or_path), "tasks": {}}
    for task in chosen:
        results["tasks"][task.name] = _run_task(run, loaded, _unshare(task, settings), settings)
        write_json(run.path / "results.json", results)
    run.finish(_summarize(chosen, results, settings, time.monotonic() - started))
    return results


def name_data(data_path: str | Path | dict[str, str] | None) -> str | dict[str, str] | None:
    """Return the user's data as a run folder keeps it.

    Args:
        data_path: As for `evaluate_model`.
    """
    if isinstance(data_path, dict):
        return {name: str(source) for name, source in data_path.items()}
    return None if data_path is None else str(data_path)


def choose_k(num_samples: int) -> list[int]:
    """Return the k for which pass@k is asked for: where each problem has one sample, only pass@1.

    Args:
        num_samples: The most samples that a problem has.
    """
    return [1, 10, 100] if num_samples > 1 else [1]


def _check_settings(settings: dict[str, Any]) -> None:
    for name in ("batch_size", "num_samples", "max_new_tokens"):
        if settings[name] is not None and settings[name] < 1:
            raise ValueError(f"{name} = {settings[name]}, allowed is 1 or more")
    for name, value in (settings["limit"] or {}).items() if isinstance(settings["limit"], dict) else []:
        find_task(name)
        if value < 1:
            raise ValueError(f"limit of {name} = {value}, allowed is 1 or more")
    if isinstance(settings["limit"], int) and settings["limit"] < 1:
        raise ValueError(f"limit = {settings['limit']}, allowed is 1 or more")
    if not 0 <= settings["temperature"] < float("inf"):
        raise ValueError(f"temperature = {settings['temperature']}, allowed is 0 (greedy) or more")
    if not 0 < settings["top_p"] <= 1:
        raise ValueError(f"top_p = {settings['top_p']}, allowed is more than 0, at most 1")
    if settings["num_samples"] > 1 and settings["temperature"] == 0:
        raise ValueError(f"num_samples = {settings['num_samples']} with temperature = 0 would repeat one completion")


def build_items(task: Task, settings: dict[str, Any]) -> list[Any]:
    """Return a task's items.

    Args:
        task: The task.
        settings: ``num_fewshot``, ``limit`` and ``data_path``, as `evaluate_model` takes them.

    Raises:
        FileNotFoundError: The data are not there.
        ValueError: They are empty, or not such as the task reads, or given for a task that is none.
    """
    limit = settings["limit"]
    if isinstance(limit, dict):
        limit = limit.get(task.name)
    items = list(_iterate_items(task, settings, limit))
    if not items:
        raise ValueError(f"data: task {task.name} has no items; its file is empty")
    return items


def _iterate_items(task: Task, settings: dict[str, Any], limit: int | None) -> Iterator[Any]:
    try:
        yield from task.build_items(_num_fewshot(task, settings), limit, _data_source(task, settings))
    except KeyError as error:
        raise ValueError(f"data: a row of {task.name} has no column {error}") from None


def _data_source(task: Task, settings: dict[str, Any]) -> str | Path | None:
    source = settings["data_path"]
    if isinstance(source, dict):
        for name in source:
            find_task(name)
        source = source.get(task.name)
    return None if source is None else find_source(source)


def _check_data(tasks: Sequence[Task], settings: dict[str, Any]) -> None:
    """Fail for data that is not there before a model is loaded, not when its task comes up."""
    for task in tasks:
        next(_iterate_items(task, settings, 1), None)


def _unshare(task: Task, settings: dict[str, Any]) -> Task:
    """The task without the answers of another one that reads its questions elsewhere or in other company."""
    if task.shares_answers_with is None:
        return task
    other = find_task(task.shares_answers_with)
    same_data = _data_source(task, settings) == _data_source(other, settings)
    same_shots = _num_fewshot(task, settings) == _num_fewshot(other, settings)
    return task if same_data and same_shots else replace(task, shares_answers_with=None)


def _num_fewshot(task: Task, settings: dict[str, Any]) -> int:
    return task.num_fewshot if settings["num_fewshot"] is None else settings["num_fewshot"]


def _run_task(run: RunFolder, loaded: LoadedModel, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    if task.kind == "choice":
        return _run_choice_task(run, loaded, task, settings)
    if task.kind == "program":
        return _run_program_task(run, loaded, task, settings)
    run_task = run_continuation_task if task.kind == "continuation" else run_completion_task
    return run_task(run, loaded, task, build_items(task, settings), settings)


def _run_choice_task(run: RunFolder, loaded: LoadedModel, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    items = build_items(task, settings)
    samples = AnswerFile(run, task)
    encoded = encode_items(loaded, items)
    can_share = _num_fewshot(task, settings) > 0 and supports_shared_prefix(loaded)
    batches = plan_batches(encoded, settings["batch_size"], can_share)
    missing = [batch for batch in batches if any((row.item.id, 0) not in samples.rows for row in batch.rows)]
    num_done = sum(len(batch.rows) for batch in batches) - sum(len(batch.rows) for batch in missing)
    with tqdm(total=len(items), initial=num_done, desc=f"evaluate {task.name}", unit="question") as bar:
        for row, scores in score_batches(loaded, missing):
            samples.append([_choice_row(row, scores)])
            bar.update()
    rows = [samples.rows[item.id, 0] for item in items]
    scores = score_answers(task, items, rows)
    samples.finish(rows)
    write_prompts(run, task, items)
    num_truncated = sum(row["is_truncated"] for row in rows)
    if num_truncated:
        logger.warning(
            "%s: %d of %d prompts lost tokens to the context of %d",
            task.name,
            num_truncated,
            len(rows),
            loaded.max_length,
        )
    return {
        **scores,
        "num_fewshot": _num_fewshot(task, settings),
        "num_truncated": num_truncated,
        "context": loaded.max_length,
    }


def _choice_row(row: Any, scores: list[float]) -> dict[str, Any]:
    # The first of equal scores wins, as numpy's argmax does in lm-eval.
    choice = max(range(len(scores)), key=scores.__getitem__)
    prediction = row.item.answer(choice)
    return {
        "id": row.item.id,
        "prediction": prediction,
        "target": row.item.target,
        "acc": int(prediction == row.item.target),
        "loglikelihoods": scores,
        "group": row.item.group,
        "is_truncated": row.is_truncated,
        **({} if row.item.answers is None else {"choice": choice}),
    }


def _run_program_task(run: RunFolder, loaded: LoadedModel, task: Task, settings: dict[str, Any]) -> dict[str, Any]:
    style = settings["prompt_style"]
    items = apply_style(style, build_items(task, settings), loaded.tokenizer, settings["model_name_or_path"])
    samples = AnswerFile(run, task)
    sampling = SamplingSettings(
        max_new_tokens=settings["max_new_tokens"] or task.max_new_tokens,
        **{key: settings[key] for key in ("num_samples", "temperature", "top_p", "seed")},
    )
    batches = plan_prompts(loaded, items, sampling, settings["batch_size"])
    missing = [b for b in batches if any((prompt.item.id, prompt.sample) not in samples.rows for prompt in b)]
    steps = len(missing) * sampling.max_new_tokens
    with tqdm(total=steps, desc=f"evaluate {task.name}: write", unit="step") as bar:
        for number, batch in enumerate(missing, start=1):
            written = complete_batches(loaded, [batch], sampling, bar.update)
            rows = [_program_row(prompt, text, style) for prompt, text in written]
            samples.append(rows)
            bar.update(number * sampling.max_new_tokens - bar.n)  # Batches may end before the length limit.
    write_prompts(run, task, items)
    return _run_tests(samples, items, task, sampling, settings)


def _program_row(prompt: EncodedPrompt, text: str, style: str) -> dict[str, Any]:
    code = take_code(style, prompt.item, text)
    return {
        "id": prompt.item.id,
        "sample": prompt.sample,
        "prediction": code,
        # The same two under OpenAI's names, so that its evaluate_functional_correctness reads this file.
        "task_id": prompt.item.id,
        "completion": code,
        "target": prompt.item.target,
        "is_truncated": prompt.is_truncated,
        **({"answer": text} if text != code else {}),
    }


def _run_tests(
    samples: AnswerFile, items: list[Any], task: Task, sampling: SamplingSettings, settings: dict[str, Any]
) -> dict[str, Any]:
    n = sampling.num_samples
    texts = [[samples.rows[item.id, sample]["prediction"] for sample in range(n)] for item in items]
    with tqdm(total=n * len(items), desc=f"evaluate {task.name}: run", unit="program") as bar:
        scores = load_metric("pass_at_k").compute(
            predictions=[[item.program(text) for text in row] for item, row in zip(items, texts, strict=True)],
            references=[item.tests for item in items],
            k=choose_k(n),
            allow_weak_sandbox=settings["allow_weak_sandbox"],
            on_result=bar.update,
        )
    outcomes = scores.pop("samples")
    rows = [
        {**samples.rows[item.id, sample], **outcome}
        for item, row in zip(items, outcomes, strict=True)
        for sample, outcome in enumerate(row)
    ]
    samples.finish(rows)
    return {
        **scores,
        "num_fewshot": _num_fewshot(task, settings),
        "prompt_style": settings["prompt_style"],
        "num_samples": n,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "num_truncated": sum(row["is_truncated"] for row in rows),
        "sandbox": describe_protection(),
    }


def _summarize(tasks: list[Task], results: dict[str, Any], settings: dict[str, Any], seconds: float) -> Summary:
    """The run folder's summary: headline figures for cards and reports."""
    lines = tuple(
        Result(
            metric=name,
            dataset=task.dataset,
            split=task.split,
            value=scores[name],
            stderr=scores[f"{name}_stderr"],
            n=scores.get(f"{name}_n", scores["n"]),
            task=task.name,
            num_fewshot=scores["num_fewshot"],
            harness="deepseek-moe" if task.metric_inputs else HARNESS,
            prompt_style="chat" if scores.get("prompt_style") == "chat" else None,
            does_not_show=task.does_not_show or None,
        )
        for task, scores in ((task, results["tasks"][task.name]) for task in tasks)
        for name in task.headline
        if scores[name] is not None
    )
    data = tuple(
        DataUse(
            name=task.dataset,
            license=task.licence,
            source=task.source,
            split=task.split,
            num_rows=results["tasks"][task.name]["n"],
            used_for="evaluation",
        )
        for task in tasks
    )
    return Summary(stage="evaluate", model=settings["model_name_or_path"], results=lines, data=data, seconds=seconds)
