"""Scores a model on benchmarks and writes a run folder: results, and every answer beside its target.

Called by ``deepseek-moe evaluate`` and the demo. Each task appends its answers to ``samples_<task>.partial.jsonl``
as they come; a run that was interrupted reads that file and goes on with what is missing. Batches are
planned over all items before the finished ones are left out, so that the numbers do not depend on where a run
stopped.
"""

import time
from pathlib import Path
from typing import Any

from deepseek_eval.model_loading import LoadedModel, limit_context, load_model, load_served
from deepseek_eval.questions import Questions, read_questions
from deepseek_eval.run_summary import data_rows, result_rows
from deepseek_eval.runners.choice import run_choice_task
from deepseek_eval.runners.document import run_text_task
from deepseek_eval.runners.media import run_media_task
from deepseek_eval.runners.program import run_program_task
from deepseek_eval.runners.text import run_completion_task, run_continuation_task
from deepseek_eval.served_model import ServedModel, is_endpoint
from deepseek_eval.settings import EvalSettings
from deepseek_records.hashes import hash_model, hash_texts, hash_tokenizer
from deepseek_records.run_folder import RunFolder, write_json
from deepseek_records.summary import Summary


def evaluate_model(
    model_name_or_path: str | Path, *, output: str | Path, overwrite: bool = False, **settings: Any
) -> dict[str, Any]:
    """Score a causal language model and write ``results.json`` and ``samples_<task>.jsonl``.

    Args:
        model_name_or_path: Checkpoint folder, run folder of ours, Hub id, or the address of a server.
        output: The run folder to write.
        overwrite: Replace a run that is in the way.
        **settings: The fields of `deepseek_eval.settings.EvalSettings`.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: An unknown task or setting, a model whose scores would mean nothing.
        FileNotFoundError: Model or data are missing.
    """
    chosen = EvalSettings.of(**settings)
    asked = [read_questions(task, chosen) for task in chosen.check()]
    started = time.monotonic()
    recipe = {"model_name_or_path": str(model_name_or_path), **chosen.to_recipe()}
    run = RunFolder.create(output, recipe, command="evaluate", seed=chosen.seed, overwrite=overwrite)
    loaded = limit_context(_load(str(model_name_or_path), chosen), chosen.max_length)
    is_served = isinstance(loaded.model, ServedModel)
    run.hold_to(
        model=hash_texts([str(model_name_or_path), loaded.model.name]) if is_served else hash_model(loaded.model),
        tokenizer=hash_tokenizer(loaded.tokenizer),
        **{f"questions_of_{questions.task.name}": questions.content_hash for questions in asked},
    )
    tasks = [questions.task for questions in asked]
    scores: dict[str, dict[str, Any]] = {}
    results = {"model": str(model_name_or_path), "tasks": scores}
    for questions in asked:
        scores[questions.task.name] = _run_task(run, loaded, questions, chosen, str(model_name_or_path))
        questions.items.clear()  # Prompts with shots are large.
        write_json(run.path / "results.json", results)
    run.finish(
        Summary(
            stage="evaluate",
            model=str(model_name_or_path),
            results=tuple(row for task in tasks for row in result_rows(task, scores[task.name])),
            data=data_rows(tasks, {name: task_scores["n"] for name, task_scores in scores.items()}),
            seconds=time.monotonic() - started,
        )
    )
    return results


def _load(source: str, settings: EvalSettings) -> LoadedModel:
    if is_endpoint(source):
        if settings.tokenizer is None:
            raise ValueError(f"tokenizer: got none for {source}, expected the served model's, a folder or a Hub id")
        return load_served(source, settings.tokenizer, trust_remote_code=settings.trust_remote_code)
    return load_model(
        source,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        adapter=settings.adapter,
        experts_implementation=settings.experts_implementation,
    )


def _run_task(
    run: RunFolder, loaded: LoadedModel, questions: Questions, settings: EvalSettings, source: str
) -> dict[str, Any]:
    task, items = questions.task, questions.items
    if task.kind == "choice" and settings.prompt_style == "base":
        return run_choice_task(run, loaded, task, items, settings)
    if task.kind == "program":
        return run_program_task(run, loaded, task, items, settings, source)
    if task.kind == "text":
        return run_text_task(run, loaded, task, items, settings)
    if task.kind == "media":
        return run_media_task(run, loaded, task, items, settings)
    answer = run_completion_task if task.kind == "completion" else run_continuation_task
    return answer(run, loaded, task, items, settings)
