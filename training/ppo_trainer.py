"""The PPO trainer under its documented name; it lives in ``deepseek_training.ppo.trainer``."""

from deepseek_training.ppo.trainer import CorrectedPPOTrainer

__all__ = ["CorrectedPPOTrainer"]
