"""The reward's place in PPO: its call on a whole batch, its errors, and its state across checkpoints.

`RewardAdapter` puts a reward callable where TRL wants a reward model. `player.py` calls it.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from deepseek_records.exit_codes import RunFailedError


class RewardError(RunFailedError, RuntimeError):
    """A reward failed in the middle of a run; a checkpoint of the last whole update has been written."""


def raise_together(failure: RewardError | None) -> None:
    """Raise in every process what failed in any, so that no process waits for another without end.

    Args:
        failure: This process's failure, if it had one.

    Raises:
        RewardError: The first process's failure.
    """
    failures = [text for text in gather_object([None if failure is None else str(failure)]) if text is not None]
    if failures:
        raise RewardError(failures[0]) from failure


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
        # as GRPO and RLOO do: a conversation is answered by a message
        shown = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ]
        scores = self.reward(prompts=prompts, completions=shown, completion_ids=rollout_ids, **kwargs)
        if inspect.isawaitable(scores):
            scores = asyncio.run(_wait(scores))
        if len(scores) != len(completions):
            raise ValueError(f"reward: got {len(scores)} scores, expected {len(completions)}, one per completion")
        if any(score is None for score in scores):
            raise ValueError("reward: got no score for a completion, expected one for each (PPO needs it)")
        values = torch.tensor([float(score) for score in scores if score is not None])
        if not torch.isfinite(values).all():
            found = values[~torch.isfinite(values)][0].item()
            raise ValueError(f"reward: got a score of {found}, expected a finite number")
        return values, completions


def reward_state(reward_model: nn.Module) -> Any:
    """Return the state of this process's reward, or None if it keeps none.

    Args:
        reward_model: A reward model as TRL takes it, or a `RewardAdapter`.
    """
    reward = _stateful(reward_model)
    return None if reward is None else reward.state_dict()


def load_reward_state(reward_model: nn.Module, state: Any) -> None:
    """Restore what `reward_state` returned.

    Args:
        reward_model: The same kind of reward.
        state: The state; None changes nothing.
    """
    if state is not None:
        _stateful(reward_model).load_state_dict(state)


def _stateful(reward_model: nn.Module) -> Any:
    """The reward callable, if it keeps a state of its own."""
    reward = vars(reward_model).get("reward")
    return reward if hasattr(reward, "state_dict") and not isinstance(reward, nn.Module) else None
