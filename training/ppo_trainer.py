"""The PPO trainer and its settings under their documented names; they live in ``deepseek_training.ppo``."""

from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.trainer import CorrectedPPOTrainer

__all__ = ["CorrectedPPOTrainer", "PPOConfig"]
