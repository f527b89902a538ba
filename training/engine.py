"""Preparation for FSDP and DeepSpeed under its documented name; see ``trainer/distributed_engine.py``."""

from deepseek_training.trainer.distributed_engine import LAUNCH_FOLDER, prepare_engine

__all__ = ["LAUNCH_FOLDER", "prepare_engine"]
