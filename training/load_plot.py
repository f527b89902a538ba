"""The expert-load heatmap under its documented name; it lives in ``deepseek_training.balance.expert_load_plot``."""

from deepseek_training.balance.expert_load_plot import LoadPlot, plot_expert_load

__all__ = ["LoadPlot", "plot_expert_load"]
