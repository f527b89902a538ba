"""What PPO plays before it learns: prompts batched, completions sampled, logps and scores taken.

Called by `deepseek_training.ppo.trainer`. TRL tells padding from text by comparing token ids, which hides every eos
when pad and eos are one token; here padding is `NO_TOKEN`, an id no tokenizer has, and TRL's functions work with it
(they replace padding by token 0 under the mask before the model sees it).
"""

import asyncio
import dataclasses
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from trl.experimental.ppo.ppo_trainer import INVALID_LOGPROB, batch_generation, truncate_response
from trl.experimental.utils import first_true_indices
from trl.trainer.utils import selective_log_softmax

from deepseek_training.ppo.forward import NO_TOKEN


@dataclasses.dataclass
class Rollout:
    """One batch of completions and what was noted about them. B prompts, P prompt tokens, T completion tokens.

    Attributes:
        query_responses: [B, P + T] token ids, prompts padded left, both with `NO_TOKEN`.
        context_length: P.
        logprobs: [B, T] of the policy that sampled, `INVALID_LOGPROB` at padding.
        ref_logprobs: [B, T] of the reference.
        values: [B, T] of the value model, 0 beyond the end.
        scores: [B] rewards.
        has_eos: [B] whether the completion ended by itself.
        padding_mask: [B, T] True after the last token.
        padding_mask_p1: [B, T] True after the position behind the last token, whose value still counts.
        completions: The completions as text.
    """

    query_responses: torch.Tensor
    context_length: int
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    values: torch.Tensor
    scores: torch.Tensor
    has_eos: torch.Tensor
    padding_mask: torch.Tensor
    padding_mask_p1: torch.Tensor
    completions: list[str]

    @property
    def responses(self) -> torch.Tensor:
        """[B, T] completion ids."""
        return self.query_responses[:, self.context_length :]

    @property
    def lengths(self) -> torch.Tensor:
        """[B] tokens of each completion, its eos included."""
        return (~self.padding_mask).sum(1)


class PromptCollator:
    """Pads ``input_ids`` on the left with `NO_TOKEN` and keeps every other column as a list.

    Left, because generation continues the last column; TRL's default collator follows the tokenizer's padding side,
    and drops on text columns, which rewards need.
    """

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch."""
        width = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), width), NO_TOKEN, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, width - len(row["input_ids"]) :] = torch.tensor(row["input_ids"])
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in ("input_ids", "attention_mask")}
        return {"input_ids": ids, **columns}


async def _wait(scores: Awaitable[list[float | None]]) -> list[float | None]:
    return await scores


class RewardAdapter(nn.Module):
    """A reward callable in the place where TRL wants a reward model.

    Args:
        reward: ``(prompts, completions, completion_ids, **columns) -> list[float | None]``; may be async, as for GRPO.
        tokenizer: Turns token ids into the text that the reward reads.
    """

    def __init__(self, reward: Callable[..., list[float | None]], tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.reward = reward
        self.tokenizer = tokenizer

    def score(self, rollout_ids: list[list[int]], prompts: list[Any], **kwargs: Any) -> tuple[torch.Tensor, list[str]]:
        """Return [B] scores and the decoded completions.

        Args:
            rollout_ids: The completions' token ids, eos included, no padding.
            prompts: What the reward reads as prompts.
            kwargs: Data columns and extras for the reward.

        Raises:
            ValueError: Another number of scores than completions, or a score that is missing or not finite.
        """
        completions = self.tokenizer.batch_decode(rollout_ids, skip_special_tokens=True)
        scores = self.reward(prompts=prompts, completions=completions, completion_ids=rollout_ids, **kwargs)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_wait(scores))
        if len(scores) != len(completions):
            raise ValueError(f"reward: {len(scores)} scores for {len(completions)} completions")
        if any(score is None for score in scores):
            raise ValueError("reward: no part could score a completion, and PPO needs a score for each")
        scores = torch.tensor([float(score) for score in scores])
        if not torch.isfinite(scores).all():
            raise ValueError(f"reward: a score is {scores[~torch.isfinite(scores)][0].item()}, wanted a finite number")
        return scores, completions


def sample(
    policy: nn.Module, queries: torch.Tensor, config: GenerationConfig, batch_size: int, stop_token_id: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sampled completions behind their prompts, [B, P + T], and the logprobs of their tokens, [B, T].

    Args:
        policy: The unwrapped policy.
        queries: [B, P] prompts padded with `NO_TOKEN`.
        config: How to sample.
        batch_size: Prompts generated at a time.
        stop_token_id: Where a completion ends; what follows becomes `NO_TOKEN`.
    """
    context_length = queries.shape[1]
    query_responses, logits = batch_generation(policy, queries, batch_size, NO_TOKEN, config)
    responses = query_responses[:, context_length:]
    logprobs = selective_log_softmax(logits, responses.clamp(min=0))
    if stop_token_id is not None:
        responses = truncate_response(stop_token_id, NO_TOKEN, responses)
    return torch.cat([queries, responses], 1), logprobs


def mask_beyond_end(
    responses: torch.Tensor, logprobs: torch.Tensor, ref_logprobs: torch.Tensor, values: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return the padding masks and the three tensors with padding filled in, as TRL fills it."""
    last = first_true_indices(responses == NO_TOKEN).unsqueeze(1) - 1
    positions = torch.arange(responses.shape[1], device=responses.device)
    padding_mask, padding_mask_p1 = positions > last, positions > last + 1
    return {
        "padding_mask": padding_mask,
        "padding_mask_p1": padding_mask_p1,
        "logprobs": logprobs.masked_fill(padding_mask, INVALID_LOGPROB),
        "ref_logprobs": ref_logprobs.masked_fill(padding_mask, INVALID_LOGPROB),
        "values": values.masked_fill(padding_mask_p1, 0),
    }
