"""PPO's evaluation on held-out prompts: each completed and scored, the processes' rows joined, errors over prompts.

Called by `deepseek_training.ppo.trainer`, whose `evaluate` adds logging. Surprising: the randomness is the same at
every call, so that evaluations differ by the policy alone, and training does not notice.
"""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import is_rich_available
from trl.experimental.ppo.ppo_trainer import print_rich_table

from deepseek_training.ppo.play import RewardError, play, raise_together

if TYPE_CHECKING:
    from deepseek_training.ppo.trainer import CorrectedPPOTrainer


def evaluate_prompts(trainer: "CorrectedPPOTrainer", dataset: Dataset) -> dict[str, list[Any]]:
    """Return a column each of reward, its parts, KL, length and completion, one row a prompt, in the data's order.

    Args:
        trainer: Whose policy completes the prompts, `num_eval_samples` times each.
        dataset: The prompts; they are dealt out to the processes.

    Raises:
        RewardError: The reward failed, in whichever process.
    """
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    mine = list(range(rank, len(dataset), world))
    size = trainer.args.per_device_eval_batch_size
    rows: list[dict[str, Any]] = []
    failure = None
    with torch.random.fork_rng():
        torch.manual_seed(trainer.local_seed)
        try:
            for _ in range(trainer.num_eval_samples):
                for start in range(0, len(mine), size):
                    indices = mine[start : start + size]
                    rows += _evaluate_batch(trainer, trainer.data_collator(list(dataset.select(indices))), indices)
        except RewardError as error:
            failure = error
    raise_together(failure)
    rows = average_by_prompt(gather_object(rows))
    return {key: [row[key] for row in rows] for key in rows[0]}


def _evaluate_batch(trainer: "CorrectedPPOTrainer", batch: dict[str, Any], indices: list[int]) -> list[dict[str, Any]]:
    """One row a prompt: reward, its parts, KL, length, completion."""
    trainer.extra_columns.clear()
    rollout = play(trainer, batch, is_evaluation=True)
    kl = (rollout.logprobs - rollout.ref_logprobs).masked_fill(rollout.padding_mask, 0).sum(1)
    columns = {
        "index": indices,
        "reward": rollout.scores.tolist(),
        **trainer.extra_columns,
        "kl": kl.tolist(),
        "length_tokens": rollout.lengths.float().tolist(),
        "completion": rollout.completions,
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def average_by_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row a prompt, in order: the mean of each number, and the first of anything else.

    Args:
        rows: Rows with an ``index`` that names the prompt, one a completion.
    """
    prompts: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(row["index"], []).append(row)
    return [
        {
            key: float(np.mean([row[key] for row in same])) if isinstance(value, float) else value
            for key, value in same[0].items()
        }
        for _, same in sorted(prompts.items())
    ]


def mean_metrics(columns: dict[str, list[Any]], prefix: str) -> dict[str, float]:
    """Return mean and standard error of each column of numbers.

    Args:
        columns: From `evaluate_prompts`.
        prefix: Put before each name.
    """
    metrics = {}
    for key, values in columns.items():
        if isinstance(values[0], float):
            metrics[f"{prefix}_{key}"] = float(np.mean(values))
            metrics[f"{prefix}_{key}_stderr"] = standard_error(values)
    return metrics


def show_samples(prompts: list[str], columns: dict[str, list[Any]], report_to: list[str]) -> None:
    """Print the first five prompts as TRL does, and send all to Weights & Biases if that is reported to.

    Args:
        prompts: As text.
        columns: From `evaluate_prompts`.
        report_to: The trackers.
    """
    table = pd.DataFrame({"query": prompts, "model response": columns["completion"], "score": columns["reward"]})
    if is_rich_available():
        print_rich_table(table.iloc[:5])
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({"completions": wandb.Table(dataframe=table)})


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean; 0 for a single value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
