"""Rewards: plain callables ``(prompts, completions, completion_ids=None, **kwargs) -> list[float]`` in [0, 1].

The same three serve PPO (`deepseek_training.ppo.trainer`) and TRL's GRPO and RLOO, whose signature they have.
"""

from deepseek_training.rewards.diversity import Diversity
from deepseek_training.rewards.relevance import Relevance
from deepseek_training.rewards.safety import Safety
from deepseek_training.rewards.weighted import MissingEosPenalty, WeightedReward

__all__ = ["Diversity", "MissingEosPenalty", "Relevance", "Safety", "WeightedReward"]
