"""What PPO learns from a rollout: rewards per token, advantages, and the clipped losses.

The formulas are TRL's (Ziegler et al. 2019, arXiv 1909.08593; Huang et al. 2024, "The N+ implementation details"),
term for term. Different is every mean over tokens, also in whitening: it is taken over the mini-batch or batch of all
processes, so that splitting it into micro-batches or processes with different numbers of tokens changes nothing.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from deepseek_training.ppo.rollout import INVALID_LOGPROB, Rollout
from deepseek_training.ppo.settings import PPOConfig

STATS = ("approxkl", "pg_clipfrac", "pg_loss", "vf_loss", "vf_clipfrac", "entropy", "ratio")
# The largest |ratio - 1| of a micro-batch's tokens; not a share, so that a mini-batch takes the largest.
DEVIATION = "ratio_deviation"


@dataclasses.dataclass
class Targets:
    """What the losses aim at. All [B, T].

    Attributes:
        advantages: Whitened over the batch, 0 at padding.
        returns: What the value model should have said.
        kl: The estimate of the divergence from the reference at each token.
        non_score_reward: The penalty for it.
    """

    advantages: torch.Tensor
    returns: torch.Tensor
    kl: torch.Tensor
    non_score_reward: torch.Tensor


def compute_targets(rollout: Rollout, args: PPOConfig, add_up: Callable[[torch.Tensor], torch.Tensor]) -> Targets:
    """Return advantages by generalized advantage estimation over score and KL penalty.

    Args:
        rollout: What was played.
        args: The settings.
        add_up: Sums a tensor over the processes.
    """
    log_ratio = rollout.ref_logprobs - rollout.logprobs
    kl = -log_ratio if args.kl_estimator == "k1" else (log_ratio.exp() - 1) - log_ratio
    rewards = -args.kl_coef * kl
    non_score_reward = rewards.clone()
    # The score falls on the position behind the last token, or on the last one where the completion fills the row.
    end = rollout.lengths.clamp(max=rewards.shape[1] - 1)
    rewards[torch.arange(len(rewards), device=rewards.device), end] += rollout.scores
    if args.whiten_rewards:
        rewards = _whiten(rewards, ~rollout.padding_mask_p1, add_up, shift_mean=False)
        rewards = rewards.masked_fill(rollout.padding_mask_p1, 0)
    advantages = _estimate_advantages(rewards, rollout.values, args.gamma, args.lam)
    returns = advantages + rollout.values
    advantages = _whiten(advantages, ~rollout.padding_mask, add_up).masked_fill(rollout.padding_mask, 0)
    return Targets(advantages, returns, kl, non_score_reward)


def _estimate_advantages(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """GAE, [B, T]: A_t = delta_t + gamma lam A_{t+1}, with delta_t = r_t + gamma V_{t+1} - V_t."""
    advantages = torch.zeros_like(rewards)
    following_value = following_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = advantages[:, t] = delta + gamma * lam * following_advantage
        following_value = values[:, t]
    return advantages


def _whiten(
    values: torch.Tensor, mask: torch.Tensor, add_up: Callable[[torch.Tensor], torch.Tensor], shift_mean: bool = True
) -> torch.Tensor:
    """TRL's `masked_whiten`, over all processes; a single token has no spread and is only centered."""
    count, total = add_up(torch.stack([mask.sum().to(values.dtype), (values * mask).sum()]))
    mean = total / count
    variance = add_up(((values - mean).square() * mask).sum()) / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else whitened + mean


def micro_batch_loss(
    model: torch.nn.Module,
    rollout: Rollout,
    targets: Targets,
    rows: torch.Tensor,
    totals: tuple[Any, ...],
    args: PPOConfig,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return this micro-batch's share of its mini-batch's loss, its share of each of `STATS`, and `DEVIATION`.

    Where the policy computes an auxiliary loss (`output_router_logits`, `router_aux_loss_coef`), as MoE models do, it
    is added and reported as ``aux_loss``.

    Args:
        model: policy and value model in one.
        rollout: What was played.
        targets: From `compute_targets`.
        rows: Which rows of the batch.
        totals: Completion tokens, value positions and rows of the mini-batch, mean over the processes.
        args: The settings.
    """
    context_length = rollout.context_length
    query_responses = rollout.query_responses[rows]
    mask, value_mask = ~rollout.padding_mask[rows], ~rollout.padding_mask_p1[rows]
    advantages, returns, values = targets.advantages[rows], targets.returns[rows], rollout.values[rows]

    logits, predicted, aux_loss = model(query_responses, context_length)
    logits = logits.float() / (args.temperature + 1e-7)
    log_total = logits.logsumexp(-1)  # not TRL's `selective_log_softmax`: the entropy below needs the totals, too
    chosen = query_responses[:, context_length:].clamp(min=0).unsqueeze(-1)
    logprobs = (logits.gather(-1, chosen).squeeze(-1) - log_total).masked_fill(~mask, INVALID_LOGPROB)

    predicted = predicted.float().masked_fill(~value_mask, 0)
    clipped = torch.clamp(predicted, values - args.cliprange_value, values + args.cliprange_value)
    vf_losses, vf_losses_clipped = (predicted - returns).square(), (clipped - returns).square()
    vf_loss = 0.5 * _share(torch.max(vf_losses, vf_losses_clipped), value_mask, totals[1])

    log_ratio = logprobs - rollout.logprobs[rows]
    ratio = log_ratio.exp()
    pg_losses = -advantages * ratio
    pg_losses_clipped = -advantages * ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
    pg_loss = _share(torch.max(pg_losses, pg_losses_clipped), mask, totals[0])
    row_share = len(rows) / totals[2]
    loss = pg_loss + args.vf_coef * vf_loss
    with torch.no_grad():
        entropy = log_total - ((logits - log_total.unsqueeze(-1)).exp() * logits).sum(-1)
        stats = {
            "approxkl": 0.5 * log_ratio.square().mean() * row_share,
            "pg_clipfrac": _share((pg_losses_clipped > pg_losses).float(), mask, totals[0]),
            "pg_loss": pg_loss.detach(),
            "vf_loss": vf_loss.detach(),
            "vf_clipfrac": _share((vf_losses_clipped > vf_losses).float(), value_mask, totals[1]),
            "entropy": entropy.mean() * row_share,
            "ratio": ratio.mean() * row_share,
            DEVIATION: (ratio - 1).abs().masked_fill(~mask, 0).max(),
        }
    if aux_loss is not None:
        loss = loss + aux_loss * row_share
        stats["aux_loss"] = aux_loss.detach() * row_share
    return loss, stats


def _share(values: torch.Tensor, mask: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / total
