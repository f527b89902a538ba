"""PPO on TRL."""

from deepseek_training.ppo.trainer import CorrectedPPOTrainer

__all__ = ["CorrectedPPOTrainer"]
