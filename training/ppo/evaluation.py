"""PPO's evaluation: held-out prompts are completed and scored, over all processes; errors are over prompts.

`CorrectedPPOTrainer.evaluate` calls it and adds logging. The randomness is the same at every call, so that two
evaluations differ by the policy alone, and training does not notice.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers.utils import is_rich_available

from deepseek_records.statistics import mean_with_error
from deepseek_training.ppo.player import Player
from deepseek_training.ppo.reward_adapter import RewardError, raise_together


def evaluate_prompts(
    player: Player,
    dataset: Dataset,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    *,
    num_samples: int,
    seed: int,
) -> dict[str, list[Any]]:
    """Return a column each of reward, its parts, KL, length and completion, one row per prompt, in the data's order.

    Args:
        player: Completes and scores the prompts.
        dataset: The prompts; they are dealt out to the processes.
        collator: Makes a batch of rows.
        num_samples: Completions of each prompt; each column holds their mean.
        seed: Of the sampling, in this process.

    Raises:
        RewardError: The reward failed, in whichever process.
    """
    rank, world = player.accelerator.process_index, player.accelerator.num_processes
    mine = list(range(rank, len(dataset), world))
    size = player.args.per_device_eval_batch_size
    rows: list[dict[str, Any]] = []
    failure = None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            for _ in range(num_samples):
                for start in range(0, len(mine), size):
                    indices = mine[start : start + size]
                    rows += _evaluate_batch(player, collator(list(dataset.select(indices))), indices)
        except RewardError as error:
            failure = error
    raise_together(failure)
    rows = average_by_prompt(gather_object(rows))
    return {key: [row[key] for row in rows] for key in rows[0]}


def _evaluate_batch(player: Player, batch: dict[str, Any], indices: list[int]) -> list[dict[str, Any]]:
    """One row per prompt: reward, its parts, KL, length, completion."""
    player.extra_columns.clear()
    rollout = player.play(batch, is_evaluation=True)
    kl = (rollout.logprobs - rollout.ref_logprobs).masked_fill(rollout.padding_mask, 0).sum(1)
    columns = {
        "index": indices,
        "reward": rollout.scores.tolist(),
        **player.extra_columns,
        "kl": kl.tolist(),
        "length_tokens": rollout.lengths.float().tolist(),
        "completion": rollout.completions,
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def average_by_prompt(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per prompt, in order: the mean of each number that was measured, and the first of anything else.

    Args:
        rows: Rows with an ``index`` that names the prompt, one per completion.
    """
    prompts: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        prompts.setdefault(row["index"], []).append(row)
    return [
        {key: _mean_or_first([row[key] for row in same]) for key in same[0]} for _, same in sorted(prompts.items())
    ]


def _mean_or_first(values: list[Any]) -> Any:
    numbers = numbers_of(values)
    return float(np.mean(numbers)) if numbers else values[0]


def numbers_of(values: list[Any]) -> list[float]:
    """Return a column's numbers; a part of a reward that does not judge a completion gives None.

    Args:
        values: One value per row.
    """
    return [value for value in values if isinstance(value, float)]


def mean_metrics(columns: dict[str, list[Any]], prefix: str) -> dict[str, float]:
    """Return mean and standard error of each column's numbers; no error of a single number.

    Args:
        columns: From `evaluate_prompts`.
        prefix: Put before each name.
    """
    metrics = {}
    for key, values in columns.items():
        numbers = numbers_of(values)
        if numbers:
            metrics[f"{prefix}_{key}"], error = mean_with_error(numbers)
            if error is not None:
                metrics[f"{prefix}_{key}_stderr"] = error
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
        _print_table(table.iloc[:5])
    if "wandb" in report_to:
        import wandb

        if wandb.run is not None:
            wandb.log({"completions": wandb.Table(dataframe=table)})


def _print_table(rows: pd.DataFrame) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows.columns, show_lines=True)
    for _, row in rows.iterrows():
        table.add_row(*row.astype(str))
    Console().print(table)
