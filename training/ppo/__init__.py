"""PPO, on TRL's class where TRL has one and on transformers' `Trainer` where not."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # its warning about experimental parts tells a user nothing

from deepseek_training.ppo.settings import PPOConfig
from deepseek_training.ppo.trainer import CorrectedPPOTrainer

__all__ = ["CorrectedPPOTrainer", "PPOConfig"]
