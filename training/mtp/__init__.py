"""Multi-token prediction of models that are not ours."""

from deepseek_training.mtp.stock_mtp import train_mtp

__all__ = ["train_mtp"]
