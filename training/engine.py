"""Preparation for FSDP and DeepSpeed under its documented name; it lives in ``deepseek_training.trainer.engine``."""

from deepseek_training.trainer.engine import LAUNCH_FOLDER, prepare_engine

__all__ = ["LAUNCH_FOLDER", "prepare_engine"]
