"""PPO on TRL."""

import os

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # pinned below 1.13, so its warning tells a user nothing

from deepseek_training.ppo.trainer import CorrectedPPOTrainer

__all__ = ["CorrectedPPOTrainer"]
