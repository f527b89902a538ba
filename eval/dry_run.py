"""What an evaluation is about to do, without doing it: questions, tokens, what it needs and about how long it takes.

Called by ``deepseek-moe evaluate --dry-run``. What the evaluation would refuse is refused; nothing is written.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek_eval.answers.continuations import encode_continuations
from deepseek_eval.answers.generation import SamplingSettings, plan_prompts
from deepseek_eval.answers.loglikelihood import encode_items
from deepseek_eval.answers.prompt_style import apply_chat, apply_style
from deepseek_eval.model_loading import LoadedModel, limit_context, load_model
from deepseek_eval.questions import Questions, read_questions
from deepseek_eval.runners.media import check_model
from deepseek_eval.runners.text import put_requests
from deepseek_eval.settings import EvalSettings
from deepseek_records.media.asking import encode_question
from deepseek_records.run_folder import RunFolder
from deepseek_records.user_text import encode_documents_plainly

_TIMED_LENGTH = 256


@dataclass(frozen=True)
class TaskPlan:
    """What one task asks of the model.

    Args:
        questions: The task and its questions.
        num_shots: Worked examples before each.
        tokens_read: Tokens of all prompts and answers that are scored; shared shots are counted with each.
        steps: Decoding steps at most, each for a batch.
    """

    questions: Questions
    num_shots: int
    tokens_read: int
    steps: int = 0


def describe_evaluation(
    model_name_or_path: str | Path, *, output: str | Path, overwrite: bool = False, **settings: Any
) -> str:
    """Return a block of lines on what `evaluate_model` would do with the same arguments.

    Args:
        model_name_or_path: As for `evaluate_model`, as are the next two.
        output: The run folder.
        overwrite: Whether a run may be in the way.
        **settings: The fields of `EvalSettings`.

    Raises:
        ValueError: What the evaluation would refuse.
        FileNotFoundError: Model or data are missing.
        FileExistsError: The folder holds something else.
    """
    chosen = EvalSettings.of(**settings)
    asked = [read_questions(task, chosen) for task in chosen.check()]
    recipe = {"model_name_or_path": str(model_name_or_path), **chosen.to_recipe()}
    if not overwrite:
        RunFolder.check(output, recipe)
    names = ("dtype", "device", "trust_remote_code", "adapter", "experts_implementation")
    loaded = load_model(model_name_or_path, **{name: getattr(chosen, name) for name in names})
    loaded = limit_context(loaded, chosen.max_length)
    plans = [_plan_task(loaded, questions, chosen, str(model_name_or_path)) for questions in asked]
    num_bytes = sum(one.numel() * one.element_size() for one in loaded.model.parameters())
    count = sum(one.numel() for one in loaded.model.parameters())
    lines = [
        f"evaluate: {model_name_or_path}, into {output}",
        f"  model        {count:,} parameters, {num_bytes / 2**30:.2f} GiB of weights, on {loaded.model.device.type}; "
        f"context {loaded.max_length:,} tokens",
    ]
    lines += [f"  {plan.questions.task.name:<12} {_words(plan)}" for plan in plans]
    return "\n".join(
        [*lines, f"  time         {_time_line(loaded, plans, chosen.batch_size)}", "dry run: nothing was written"]
    )


def _plan_task(loaded: LoadedModel, questions: Questions, settings: EvalSettings, source: str) -> TaskPlan:
    task, items, style = questions.task, questions.items, settings.prompt_style
    shots = settings.shots_of(task)
    if task.kind == "text":
        encoded = encode_documents_plainly([item.prompt for item in items], loaded.tokenizer)
        return TaskPlan(questions, shots, sum(map(len, encoded)))
    if task.kind == "media":
        check_model(loaded, task, items)
        read = 3 * sum(len(encode_question(item.media, loaded.processor)) for item in items)
        steps = 3 * -(-len(items) // settings.batch_size) * (settings.max_new_tokens or task.max_new_tokens)
        return TaskPlan(questions, shots, read, steps)
    if task.kind == "choice" and style == "base":
        return TaskPlan(questions, shots, sum(len(row.token_ids) for row in encode_items(loaded, items)))
    if task.kind in ("choice", "continuation"):
        items = apply_chat(items, loaded.tokenizer, source) if style == "chat" else items
        rows = encode_continuations(loaded, items)
        return TaskPlan(questions, shots, sum(len(ids) for row in rows for ids in row.token_ids))
    is_program = task.kind == "program"
    requests: Sequence[Any] = (
        apply_style(style, items, loaded.tokenizer, source)
        if is_program
        else put_requests(items, loaded.tokenizer, style, source)
    )
    sampling = SamplingSettings(
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        num_samples=settings.num_samples if is_program else 1,
    )
    batches = plan_prompts(loaded, requests, sampling, settings.batch_size)
    read = sum(len(prompt.token_ids) for batch in batches for prompt in batch)
    return TaskPlan(questions, shots, read, len(batches) * sampling.max_new_tokens)


def _words(plan: TaskPlan) -> str:
    task = plan.questions.task
    num_items = len(plan.questions.items)
    of_all = f" of {task.data.num_questions:,}" if num_items < task.data.num_questions else ""
    parts = [f"{task.data.name}: {num_items:,}{of_all} items, {plan.tokens_read:,} tokens to read"]
    if task.max_fewshot:
        parts.append(f"{plan.num_shots} shots")
    if plan.steps:
        parts.append(f"at most {plan.steps:,} decoding steps")
    return ", ".join(parts)


def _time_line(loaded: LoadedModel, plans: list[TaskPlan], batch_size: int) -> str:
    length = min(_TIMED_LENGTH, loaded.max_length)
    read_s = sum(plan.tokens_read for plan in plans) * _time_forward(loaded, 2, length) / (2 * length)
    steps = sum(plan.steps for plan in plans)
    write_s = steps * _time_forward(loaded, batch_size, 1) if steps else 0.0
    written = f", and at most {write_s:,.0f} s to write" if steps else ""
    programs = "; the programs' tests come on top" if any(p.questions.task.kind == "program" for p in plans) else ""
    return f"about {read_s:,.0f} s to read{written} (from a forward pass of random tokens, measured here){programs}"


@torch.inference_mode()
def _time_forward(loaded: LoadedModel, rows: int, length: int) -> float:
    """Seconds of a forward pass; the first one also builds what later ones reuse."""
    size = loaded.model.config.get_text_config().vocab_size
    ids = torch.randint(size, (rows, length), generator=torch.Generator().manual_seed(0)).to(loaded.model.device)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        loaded.model(input_ids=ids, use_cache=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
