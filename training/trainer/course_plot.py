"""The picture of a run: ``plots/course.png``, redrawn at each checkpoint and at the end from ``metrics.jsonl``.

Loss, held-out bits per byte of each source, learning rate, gradient norm and tokens per second, over the steps; what
a stage does not log has no panel.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_training.balance.run_plot import RunPlot

# Title and the name in the log.
_PANELS = (
    ("training loss, nats per token", "loss"),
    ("learning rate", "learning_rate"),
    ("gradient norm", "grad_norm"),
    ("tokens per second", "tokens_per_second"),
)
_HELD_OUT = re.compile(r"eval_(.*)_bits_per_byte")


class CoursePlot(RunPlot):
    """The course of a run."""

    def draw(self) -> None:
        """Draw what the run has logged so far."""
        plot_course(self.run.metrics, self.run.path / "plots" / "course.png")


def plot_course(rows: Sequence[dict[str, Any]], path: Path) -> bool:
    """Draw a run's log; return whether there was anything to draw.

    Args:
        rows: Lines of ``metrics.jsonl``.
        path: The PNG file; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(title, [("", *_series(rows, name))]) for title, name in _PANELS]
    held_out = dict.fromkeys(name for row in rows for name in row if _HELD_OUT.fullmatch(name))
    lines = [(_HELD_OUT.sub(r"\1", name), *_series(rows, name)) for name in held_out]
    panels.insert(1, ("held-out, bits per byte", lines))
    panels = [(title, [line for line in lines if line[1]]) for title, lines in panels]
    panels = [(title, lines) for title, lines in panels if lines]
    if not panels:
        return False
    figure = Figure(figsize=(3.6 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would choose a display and keep the figure
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name, steps, values in lines:
            axes.plot(steps, values, marker="o" if len(steps) < 15 else "", markersize=3, label=name)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step")
        if any(name for name, *_ in lines):
            axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in found], [value for _, value in found]
