"""Runs the tasks that are answered by programs: the model writes them, the sandbox runs their tests."""

from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from deepseek_eval.answers.generation import EncodedPrompt, SamplingSettings, complete_batches, plan_prompts
from deepseek_eval.answers.prompt_style import apply_style, take_code, write_prompts
from deepseek_eval.answers.samples_writer import AnswerFile
from deepseek_eval.metrics.loading import load_metric
from deepseek_eval.model_loading import LoadedModel
from deepseek_eval.runners.truncation import warn_of_truncation
from deepseek_eval.sandbox.client import describe_protection
from deepseek_eval.settings import EvalSettings
from deepseek_eval.tasks.task import ProgramItem, Task
from deepseek_records.run_folder import RunFolder


def choose_k(num_samples: int) -> list[int]:
    """Return the k for which pass@k is asked for: 1, 2, 5, 10 and 100, as far as there are samples.

    Args:
        num_samples: The most samples that a problem has.
    """
    return [k for k in (1, 2, 5, 10, 100) if k <= max(1, num_samples)]


def run_program_task(
    run: RunFolder, loaded: LoadedModel, task: Task, items: Sequence[ProgramItem], settings: EvalSettings, source: str
) -> dict[str, Any]:
    """Write the programs, run their tests and return pass@k.

    Args:
        run: Where the answers go.
        loaded: Model and tokenizer.
        task: A task of kind ``program``.
        items: Its problems.
        settings: Prompt style, batch size and the settings of sampling.
        source: The model's name, for errors.

    Raises:
        ValueError: The context leaves no room for a prompt, or a model that returns NaN.
    """
    style = settings.prompt_style
    items = apply_style(style, items, loaded.tokenizer, source)
    samples = AnswerFile(run, task, items)
    sampling = SamplingSettings(
        max_new_tokens=settings.max_new_tokens or task.max_new_tokens,
        num_samples=settings.num_samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed,
    )
    batches = plan_prompts(loaded, items, sampling, settings.batch_size)
    missing = [b for b in batches if any((prompt.item.id, prompt.sample) not in samples.rows for prompt in b)]
    steps = len(missing) * sampling.max_new_tokens
    with tqdm(total=steps, desc=f"evaluate {task.name}: write", unit="step") as bar:
        for number, batch in enumerate(missing, start=1):
            written = complete_batches(loaded, [batch], sampling, bar.update)
            samples.append([_program_row(prompt, text, style) for prompt, text in written])
            bar.update(number * sampling.max_new_tokens - bar.n)  # Batches may end before the length limit.
    write_prompts(run, task, items)
    scores = _run_tests(samples, items, task, settings)
    rows = scores.pop("rows")
    num_truncated = warn_of_truncation(task, rows, loaded.max_length)
    return {
        **scores,
        "num_fewshot": settings.shots_of(task),
        "prompt_style": style,
        "num_samples": settings.num_samples,
        "temperature": sampling.temperature,
        "max_new_tokens": sampling.max_new_tokens,
        "num_truncated": num_truncated,
        "sandbox": describe_protection(),
    }


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


def _run_tests(samples: AnswerFile, items: list[ProgramItem], task: Task, settings: EvalSettings) -> dict[str, Any]:
    """Run every program and write its verdict beside it; what the metric says, and the finished ``rows``."""
    n = settings.num_samples
    texts = [[samples.rows[item.id, sample]["prediction"] for sample in range(n)] for item in items]
    with tqdm(total=n * len(items), desc=f"evaluate {task.name}: run", unit="program") as bar:
        scores = load_metric("pass_at_k").compute(
            predictions=[[item.program(text) for text in row] for item, row in zip(items, texts, strict=True)],
            references=[item.tests for item in items],
            k=choose_k(n),
            allow_weak_sandbox=settings.allow_weak_sandbox,
            on_result=bar.update,
        )
    outcomes = scores.pop("samples")
    rows = [
        {**samples.rows[item.id, sample], **outcome}
        for item, row in zip(items, outcomes, strict=True)
        for sample, outcome in enumerate(row)
    ]
    samples.finish(rows)
    return {**scores, "rows": rows}
