"""Training's figures under their documented name; they live in ``deepseek_training.balance.training_figures``."""

from deepseek_training.balance.training_figures import TrainingFigures

__all__ = ["TrainingFigures"]
