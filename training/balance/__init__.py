"""Expert balancing inside any transformers Trainer, and its figures."""

from deepseek_training.balance.callback import ExpertBalanceCallback
from deepseek_training.balance.expert_load_plot import plot_expert_load
from deepseek_training.balance.training_figures import TrainingFigures

__all__ = ["ExpertBalanceCallback", "TrainingFigures", "plot_expert_load"]
