"""The picture of the experts' load over a run: ``plots/expert_load.png``, redrawn at each checkpoint.

It is drawn from ``metrics.jsonl``, so a resumed run shows the whole history.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deepseek_training.balance.router_figures import LoadRecord
from deepseek_training.balance.run_plot import RunPlot


class LoadPlot(RunPlot):
    """The experts' load over a run."""

    def draw(self) -> None:
        """Draw what the run has logged so far."""
        records = [LoadRecord.from_row(row) for row in self.run.metrics if "tokens_per_expert" in row]
        plot_expert_load(records, self.run.path / "plots" / "expert_load.png")


def plot_expert_load(records: Sequence[LoadRecord], path: Path) -> bool:
    """Draw each layer's load, relative to an even one, over the steps; return whether there was anything to draw.

    Args:
        records: For example `ExpertBalanceCallback.history`.
        path: The PNG file; its folder is made.
    """
    if not records:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [record.step for record in records]
    num_layers = len(records[-1].tokens_per_expert)
    figure = Figure(figsize=(7, 0.6 + 1.5 * num_layers), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would choose a display and keep the figure
    panels = figure.subplots(num_layers, 1, sharex=True, squeeze=False)[:, 0]
    for layer, axes in enumerate(panels):
        load_SE = np.array([record.tokens_per_expert[layer] for record in records], dtype=float)
        relative = load_SE / load_SE.mean(axis=1, keepdims=True).clip(min=1e-12)
        edges = [steps[0] - (steps[1] - steps[0] if len(steps) > 1 else 1), *steps]
        image = axes.pcolormesh(edges, np.arange(relative.shape[1] + 1), relative.T, cmap="viridis", vmin=0, vmax=3)
        axes.set_ylabel(f"MoE layer {layer + 1}\nexpert")
        axes.set_title(f"max / mean {relative[-1].max():.2f} at the end", fontsize=8, loc="right")
    panels[-1].set_xlabel("optimizer step")
    figure.colorbar(image, ax=list(panels), label="load, 1 = even")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True
