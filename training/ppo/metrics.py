"""What PPO logs of a step, under TRL's names, and how the time of a step was spent.

`trainer.py` calls it.
"""

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from deepseek_training.ppo.forward import NO_TOKEN
from deepseek_training.ppo.rollout import Rollout
from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.stopwatch import Stopwatch
from deepseek_training.ppo.update import DEVIATION, Targets


def speed_metrics(watch: Stopwatch, rollout: Rollout, args: PPOConfig) -> dict[str, float]:
    """Return episodes and tokens per second (of this process), and each part's share of the time.

    Args:
        watch: Of the step.
        rollout: The step's.
        args: The settings.
    """
    seconds, total = watch.seconds, max(sum(watch.seconds.values()), 1e-9)
    update_tokens = int((rollout.query_responses != NO_TOKEN).sum()) * args.num_ppo_epochs
    return {
        "eps": args.batch_size / total,
        "rollout_tokens_per_second": int(rollout.lengths.sum()) / max(seconds["generation"], 1e-9),
        "update_tokens_per_second": update_tokens / max(seconds["update"], 1e-9),
        **{f"time/{name}_share": value / total for name, value in seconds.items()},
    }


def step_means(rollout: Rollout, targets: Targets, stats: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return what is averaged over the processes: TRL's metrics, and length and ends of the completions.

    Args:
        rollout: What was played.
        targets: What the losses aimed at.
        stats: One value a mini-batch of each of `STATS`.
    """
    entropy = (-rollout.logprobs).masked_fill(rollout.padding_mask, 0).sum(1).mean()
    non_score = targets.non_score_reward.sum(1).mean()
    return {
        "objective/kl": targets.kl.sum(1).mean(),
        "objective/entropy": entropy,
        "objective/non_score_reward": non_score,
        "objective/rlhf_reward": non_score + rollout.scores.mean(),
        "objective/scores": rollout.scores.mean(),
        "policy/approxkl_avg": stats["approxkl"].mean(),
        "policy/clipfrac_avg": stats["pg_clipfrac"].mean(),
        "loss/policy_avg": stats["pg_loss"].mean(),
        "loss/value_avg": stats["vf_loss"].mean(),
        "val/clipfrac_avg": stats["vf_clipfrac"].mean(),
        "policy/entropy_avg": stats["entropy"].mean(),
        "val/ratio": stats["ratio"].mean(),
        # Before the first optimizer step it would be 0, were sampling and update to compute the same bits.
        "val/first_ratio_deviation": stats[DEVIATION][0],
        "length_tokens": rollout.lengths.float().mean(),
        "has_eos": rollout.has_eos.float().mean(),
        **{name: stats[name].mean() for name in ("grad_norm", "aux_loss") if name in stats},
    }


def mean_by_name(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each number over the processes that have it.

    Args:
        rows: One a process; a reward may log something in one process only.
    """
    names = {name: None for row in rows for name in row}
    values = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def count_eos(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many completions of this process hold the tokenizer's eos.

    Args:
        rollout: What was played.
        tokenizer: Whose eos.
    """
    return int((rollout.responses == tokenizer.eos_token_id).sum())
