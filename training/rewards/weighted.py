"""The weighted sum of rewards, R = 0.7 relevance + 0.2 safety + 0.1 diversity in the article's setting.

Called like its parts, by PPO, GRPO and RLOO. Surprising: a part may answer None for a completion it cannot judge; the
other weights are then renormalised, where TRL's own `reward_weights` would let the sum shrink.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

Reward = Callable[..., Sequence[float | None]]


class WeightedReward:
    """The mean of several rewards under weights, in [0, 1] where each part is.

    With a gate, the sum is multiplied by min(1, score of the gate / `gate_threshold`): under weights alone an unsafe
    completion only loses the 0.2 of safety, which more relevance buys back.

    Args:
        rewards: Callables with the shared signature.
        weights: One a reward, none negative, not all zero; only their ratios matter.
        gate: Name of the reward that gates, for example ``safety``; None leaves the plain sum.
        gate_threshold: From this score on the gate is open, in (0, 1].

    Example:
        >>> from deepseek_training.rewards import Diversity, WeightedReward
        >>> WeightedReward([Diversity()], weights=[1.0])(prompts=["Hello"], completions=[""])
        [0.0]
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float],
        *,
        gate: str | None = None,
        gate_threshold: float = 0.7,
    ):
        if len(rewards) != len(weights) or not rewards:
            raise ValueError(f"weights: {len(weights)} given for {len(rewards)} rewards; wanted one for each")
        if any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
            raise ValueError(
                f"weights={list(weights)}: none may be negative or infinite, and their sum must be above 0"
            )
        self.__name__ = "weighted_reward"
        self.rewards = list(rewards)
        self.weights = [weight / sum(weights) for weight in weights]
        self.names = [reward.__name__ for reward in rewards]
        if gate is not None and gate not in self.names:
            raise ValueError(f"gate={gate!r}: allowed are {', '.join(self.names)}")
        if not 0 < gate_threshold <= 1:
            raise ValueError(f"gate_threshold={gate_threshold}: allowed is above 0 and at most 1")
        self.gate, self.gate_threshold = gate, gate_threshold

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float | None]:
        """Return the weighted scores; None where no part could judge.

        Args:
            prompts: Strings or chat messages, one a completion.
            completions: Strings or chat messages.
            completion_ids: Token ids of the completions, passed on to the parts.
            kwargs: Data columns and the trainer's extras; ``log_metric(name, value)`` receives each part's mean,
                ``log_extra(column, values)`` each part's scores.
        """
        parts = self.components(prompts, completions, completion_ids, **kwargs)
        log_metric, log_extra = kwargs.get("log_metric"), kwargs.get("log_extra")
        for name, scores in parts.items():
            known = [score for score in scores if score is not None]
            if log_metric is not None and known:
                log_metric(f"reward_{name}", sum(known) / len(known))
            if log_extra is not None:
                log_extra(f"reward_{name}", scores)
        totals = [self._combine(row) for row in zip(*parts.values(), strict=True)]
        if self.gate is None:
            return totals
        return [
            total if total is None or guard is None else total * min(1.0, guard / self.gate_threshold)
            for total, guard in zip(totals, parts[self.gate], strict=True)
        ]

    def components(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> dict[str, list[float | None]]:
        """Return each part's scores by its name.

        Raises:
            ValueError: A part returned another number of scores than completions, or a score that is not finite.
        """
        parts = {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            scores = list(reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs))
            if len(scores) != len(completions):
                raise ValueError(f"reward {name}: {len(scores)} scores for {len(completions)} completions")
            if any(score is not None and not math.isfinite(score) for score in scores):
                raise ValueError(f"reward {name}: a score is not a finite number; return None where it cannot judge")
            parts[name] = scores
        return parts

    def _combine(self, scores: Sequence[float | None]) -> float | None:
        """The weighted mean over the parts that judged."""
        known = [(weight, score) for weight, score in zip(self.weights, scores, strict=True) if score is not None]
        total = sum(weight for weight, _ in known)
        return sum(weight * score for weight, score in known) / total if total > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parts that keep one, for a checkpoint."""
        parts = zip(self.names, self.rewards, strict=True)
        return {name: reward.state_dict() for name, reward in parts if hasattr(reward, "state_dict")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the parts' state from a checkpoint."""
        for name, reward in zip(self.names, self.rewards, strict=True):
            if name in state:
                reward.load_state_dict(state[name])
