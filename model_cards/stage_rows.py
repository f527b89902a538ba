"""Stages as ready text, the same for the card and the report: data, command, time, machine, recipe."""

from typing import Any

import yaml

from deepseek_model_cards.summary_table import check_rows, pair_results
from deepseek_model_cards.wording import format_bytes, format_seconds, format_value
from deepseek_records.environment import Environment
from deepseek_records.stages import Stage
from deepseek_records.summary import DataUse

_TITLES = {
    "tokenizer": "Tokenizer",
    "pretrain": "Pretraining",
    "adapt": "Continued pretraining on a domain",
    "distill": "Distillation from a larger model",
    "shrink": "Cut out of a larger model",
    "upcycle": "Made of a dense model",
    "sft": "Supervised fine-tuning on conversations",
    "dpo": "Alignment by DPO",
    "align": "Alignment by PPO",
    "grpo": "Alignment by GRPO",
    "evaluate": "Evaluation",
    "train": "Training with transformers' Trainer",
}


def stage_title(stage: Stage) -> str:
    """Return what a stage is called on a page: by the command that made it, and its folder's name where that differs.

    Args:
        stage: A stage.
    """
    title = _TITLES.get(stage.kind, stage.kind)
    return title if stage.name == stage.kind else f"{title} ({stage.name})"


def data_row(stage: Stage, row: DataUse) -> dict[str, str]:
    """Return a data set as ready text.

    Args:
        stage: The stage that used it.
        row: One of its data sets.
    """
    return {
        "name": row.name,
        "split": row.split or "not stated",
        "license": row.license,
        "source": row.source,
        "stage": stage.name,
        "used_for": row.used_for,
        "num_rows": format_value(row.num_rows),
        "size": format_bytes(row.num_bytes),
    }


def stage_row(stage: Stage) -> dict[str, Any]:
    """Return a stage as ready text: command, time, machine, results, checks, recipe.

    Args:
        stage: A stage, finished or not.
    """
    environment = stage.environment
    return {
        "title": stage_title(stage),
        "method": method_line(stage),
        "finished": stage.is_finished,
        "command": stage.command_line or "not recorded",
        "time": format_seconds(stage.seconds),
        "seed": format_value(environment.seed),
        "commit": environment.commit or "not recorded",
        "machine": describe_machine(environment),
        "results": pair_results(stage.results),
        "checks": check_rows(stage),
        "recipe": yaml.safe_dump(_without_prompts(stage.settings), sort_keys=False, allow_unicode=True).strip(),
    }


def method_line(stage: Stage) -> str:
    """Return what was trained where that is not every weight: an adapter; nothing otherwise.

    Args:
        stage: A stage.
    """
    rank = stage.settings.get("lora_rank")
    if not isinstance(rank, int) or rank < 1:
        return ""
    targets = stage.settings.get("lora_targets")
    where = f"on {', '.join(map(str, targets))}" if isinstance(targets, list) else "on attention and routed experts"
    return f"Trained by LoRA of rank {rank} {where}; the adapter is merged into the weights of this model."


def _without_prompts(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the prompts that samples are written for: texts go out with the samples or not at all."""
    prompts = settings.get("sample_prompts")
    return {**settings, "sample_prompts": f"{len(prompts)} prompts, not shown"} if prompts else settings


def describe_machine(environment: Environment) -> str:
    """Return a run's machine in words.

    Args:
        environment: The run's environment.
    """
    machine = environment.machine
    parts = [part for part in (machine.system, machine.processor) if part]
    if machine.num_cpus:
        parts.append(f"{machine.num_cpus} CPU cores")
    parts += machine.gpus or (["no GPU"] if parts else [])
    return ", ".join(parts) or "not recorded"


def total_seconds(stages: dict[str, Stage]) -> float | None:
    """Return the time of all finished stages in seconds, None where none recorded it.

    Args:
        stages: What `read_stages` gave.
    """
    seconds = [stage.seconds for stage in stages.values() if stage.seconds is not None]
    return sum(seconds) if seconds else None
