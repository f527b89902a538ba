"""The weighted sum of rewards, R = 0.7 relevance + 0.2 safety + 0.1 diversity in the article's setting.

    R = clip(gate * sum of w_i x_i / sum of w_i over the parts that judged + sum of penalties, 0, 1)  (*)
    gate = min(1, x_gate / gate_threshold), or 1 without a gate and where the gating part answers None
    x_i  = the part's score, or standardized: the share of earlier scores a normal curve puts below it
    (*) clipped only where penalties are given

Called like its parts, by PPO, GRPO and RLOO. A part may answer None for a completion it cannot judge; the
other weights are then renormalized, where TRL's own `reward_weights` would let the sum shrink.
"""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

Reward = Callable[..., Sequence[float | None]]
_DECAY = 0.98  # of the running mean and variance, a batch
_LEAST_STD = 0.02


class WeightedReward:
    """The mean of several rewards under weights, in [0, 1] where each part is.

    With a gate, an unsafe completion cannot buy back with relevance what it loses in safety. Standardized, each part
    spreads alike, so that the weights and not the parts' variances say what counts.

    Args:
        rewards: Callables with the shared signature, each with a ``__name__`` of its own.
        weights: One a reward, none negative, not all zero; only their ratios matter.
        gate: Name of the reward that gates, for example ``safety``; None leaves the plain sum.
        gate_threshold: From this score on the gate is open, in (0, 1]; at 1 every doubt counts.
        penalties: Callables with the shared signature and values of at most 0, for example from `trl.rewards`; None
            takes nothing off.
        is_standardized: Replace each score by its place among the part's earlier scores.

    Raises:
        ValueError: Weights, gate or threshold out of range, or a reward without a name of its own.

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
        gate_threshold: float = 1.0,
        penalties: Sequence[Reward] = (),
        is_standardized: bool = False,
    ) -> None:
        if len(rewards) != len(weights) or not rewards:
            raise ValueError(f"weights: {len(weights)} given for {len(rewards)} rewards, expected one for each")
        if any(not math.isfinite(weight) or weight < 0 for weight in weights) or sum(weights) <= 0:
            raise ValueError(f"weights: got {list(weights)}, expected finite numbers of at least 0 with a sum above 0")
        self.__name__ = "weighted_reward"
        self.rewards = list(rewards)
        self.weights = [weight / sum(weights) for weight in weights]
        self.names = _names_of(rewards)
        if gate is not None and gate not in self.names:
            raise ValueError(f"gate: got {gate!r}, expected {', '.join(self.names)}")
        if not 0 < gate_threshold <= 1:
            raise ValueError(f"gate_threshold: got {gate_threshold}, expected above 0 and at most 1")
        self.gate, self.gate_threshold = gate, gate_threshold
        self.penalties = list(penalties)
        self.is_standardized = is_standardized
        self.moments: dict[str, tuple[float, float]] = {}

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> list[float | None]:
        """Return the weighted scores; None where no part could judge.

        Args:
            prompts: Strings or chat messages, one a completion.
            completions: Strings or chat messages.
            completion_ids: Token ids of the completions, passed on to the parts.
            kwargs: Data columns and the trainer's extras; ``log_metric(name, value)`` receives each part's mean,
                ``log_extra(column, values)`` each part's scores, as they are before standardizing.
        """
        parts = self.components(prompts, completions, completion_ids, **kwargs)
        log_metric, log_extra = kwargs.get("log_metric"), kwargs.get("log_extra")
        for name, scores in parts.items():
            known = [score for score in scores if score is not None]
            if log_metric is not None and known:
                log_metric(f"reward_{name}", sum(known) / len(known))
            if log_extra is not None:
                log_extra(f"reward_{name}", scores)
        totals = [self._combine(row) for row in zip(*self._standardize(parts, kwargs).values(), strict=True)]
        if self.gate is not None:
            gates = [1.0 if score is None else min(1.0, score / self.gate_threshold) for score in parts[self.gate]]
            totals = [None if total is None else total * gate for total, gate in zip(totals, gates, strict=True)]
        if self.penalties:
            off = self._penalize(prompts, completions, completion_ids, kwargs)
            pairs = zip(totals, off, strict=True)
            totals = [None if total is None else min(1.0, max(0.0, total + value)) for total, value in pairs]
        return totals

    def components(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any = None, **kwargs: Any
    ) -> dict[str, list[float | None]]:
        """Return each part's scores by its name.

        Raises:
            ValueError: A part returned another number of scores than completions, or a score that is not finite.
        """
        parts = {}
        for name, reward in zip(self.names, self.rewards, strict=True):
            scores = reward(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
            parts[name] = _check_scores(f"reward {name}", scores, len(completions))
        return parts

    def _penalize(
        self, prompts: list[Any], completions: list[Any], completion_ids: Any, kwargs: dict[str, Any]
    ) -> list[float]:
        """The sum of the penalties of each completion."""
        sums = [0.0] * len(completions)
        for penalty in self.penalties:
            name = f"penalty {penalty.__name__ if hasattr(penalty, '__name__') else type(penalty).__name__}"
            values = penalty(prompts=prompts, completions=completions, completion_ids=completion_ids, **kwargs)
            values = [value or 0.0 for value in _check_scores(name, values, len(completions))]
            if max(values, default=0.0) > 0:
                raise ValueError(f"{name}: {max(values)} would be added to a score, expected 0 or less")
            sums = [total + value for total, value in zip(sums, values, strict=True)]
        return sums

    def _standardize(self, parts: dict[str, list[Any]], kwargs: dict[str, Any]) -> dict[str, list[Any]]:
        """Each score's place under a normal curve with the part's running mean and variance."""
        if not self.is_standardized:
            return parts
        placed = {}
        for name, scores in parts.items():
            known = [score for score in scores if score is not None]
            if known and (name not in self.moments or not kwargs.get("is_evaluation", False)):
                self._update_moments(name, known)
            mean, variance = self.moments.get(name, (0.5, 1.0))
            curve = NormalDist(mean, max(_LEAST_STD, math.sqrt(variance)))
            placed[name] = [None if score is None else curve.cdf(score) for score in scores]
        return placed

    def _update_moments(self, name: str, scores: list[float]) -> None:
        mean = sum(scores) / len(scores)
        old_mean, old_variance = self.moments.get(name, (mean, None))
        new_mean = _DECAY * old_mean + (1 - _DECAY) * mean
        variance = sum((score - new_mean) ** 2 for score in scores) / len(scores)
        if old_variance is not None:
            variance = _DECAY * old_variance + (1 - _DECAY) * variance
        self.moments[name] = (new_mean, variance)

    def _combine(self, scores: Sequence[float | None]) -> float | None:
        """The weighted mean over the parts that judged."""
        known = [(weight, score) for weight, score in zip(self.weights, scores, strict=True) if score is not None]
        total = sum(weight for weight, _ in known)
        return sum(weight * score for weight, score in known) / total if total > 0 else None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the parts that keep one and the running moments, for a checkpoint."""
        parts = zip(self.names, self.rewards, strict=True)
        states = {name: reward.state_dict() for name, reward in parts if hasattr(reward, "state_dict")}
        return {"parts": states, "moments": {name: list(pair) for name, pair in self.moments.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        for name, reward in zip(self.names, self.rewards, strict=True):
            if name in state["parts"]:
                reward.load_state_dict(state["parts"][name])
        self.moments = {name: tuple(pair) for name, pair in state["moments"].items()}


def _names_of(rewards: Sequence[Reward]) -> list[str]:
    """The rewards' names, under which their scores are kept and logged."""
    for i, reward in enumerate(rewards):
        if not hasattr(reward, "__name__"):
            raise ValueError(f"rewards: number {i} ({type(reward).__name__}) has no __name__, expected one of its own")
    names = [reward.__name__ for reward in rewards]
    if len(set(names)) < len(names):
        raise ValueError(f"rewards: named {', '.join(names)}, expected a __name__ of its own for each")
    return names


def _check_scores(name: str, scores: Sequence[float | None], num_completions: int) -> list[float | None]:
    """The scores as a list, one a completion, each finite or None."""
    scores = list(scores)
    if len(scores) != num_completions:
        raise ValueError(f"{name}: {len(scores)} scores for {num_completions} completions")
    if any(score is not None and not math.isfinite(score) for score in scores):
        raise ValueError(f"{name}: a score is not a finite number; return None where it cannot judge")
    return scores


class MissingEosPenalty:
    """A penalty for completions that do not end by themselves, for GRPO and RLOO; PPO has its own setting.

    Args:
        eos_token_id: The token that ends a completion.
        penalty: What is taken off, finite and 0 or more.
    """

    def __init__(self, eos_token_id: int, penalty: float) -> None:
        if not 0 <= penalty < math.inf:
            raise ValueError(f"penalty: got {penalty}, expected a finite number of 0 or more")
        self.__name__ = "missing_eos_penalty"
        self.eos_token_id, self.penalty = eos_token_id, penalty

    def __call__(self, completion_ids: list[list[int]] | None = None, **kwargs: Any) -> list[float]:
        """Return 0 or minus the penalty for each completion.

        Args:
            completion_ids: Token ids of the completions, which every trainer passes on.
            kwargs: Not used.

        Raises:
            ValueError: There are no token ids.
        """
        if completion_ids is None:
            raise ValueError("missing_eos_penalty: completion_ids: got None, expected the completions' token ids")
        return [0.0 if ids and ids[-1] == self.eos_token_id else -self.penalty for ids in completion_ids]
