"""The picture of ``deepseek-moe bench update``: forgetting matrices, and what each method learns and forgets."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from deepseek_cli.benchmarks.update_sequence import Updated
from deepseek_cli.benchmarks.update_texts import FIRST, LATER

_SHOWN = ("naive", "replay + gate")


def draw(runs: dict[str, dict[str, list[Updated]]], figures: dict[str, dict[str, Any]], path: Path) -> None:
    """Write the picture.

    Args:
        runs: By seed and method.
        figures: By method.
        path: The file.
    """
    shown = [name for name in _SHOWN if name in figures] or [name for name in figures if "learned" in figures[name]][
        :2
    ]
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(5 * len(shown) + 5, 4.4), layout="constrained")
    axes = np.atleast_1d(axes)
    changes = {name: _mean_change(runs, name) for name in shown}
    most = max(np.abs(change).max() for change in changes.values()) if changes else 1.0
    for axis, (name, change) in zip(axes, changes.items(), strict=False):
        image = axis.imshow(change, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
        for row, column in np.ndindex(change.shape):
            color = "white" if abs(change[row, column]) > 0.6 * most else "black"
            axis.text(column, row, f"{change[row, column]:+.2f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(len(LATER) + 1), (FIRST, *LATER), rotation=35, ha="right")
        axis.set_yticks(range(len(LATER)), [f"after {one}" for one in LATER])
        axis.set_title(f"{name}: bits per byte against before")
        figure.colorbar(image, ax=axis, fraction=0.045)
    axis = axes[-1]
    placed: list[tuple[float, float]] = []
    for name, row in figures.items():
        if "learned" not in row:
            continue
        (x, x_error), (y, y_error) = row["learned"], row["forgotten"]
        axis.errorbar(x, y, xerr=x_error or 0, yerr=y_error or 0, fmt="o", capsize=3)
        is_crowded = any(abs(x - other) < 0.12 and abs(y - lower) < 0.05 for other, lower in placed)
        axis.annotate(name, (x, y), xytext=(6, -13 if is_crowded else 4), textcoords="offset points", fontsize=9)
        placed.append((x, y))
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_xlabel("learned of each text, bits per byte")
    axis.set_ylabel("forgotten at the end, bits per byte")
    axis.set_title("right: learns more; low: forgets less")
    axis.margins(0.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _mean_change(runs: dict[str, dict[str, list[Updated]]], name: str) -> np.ndarray:
    """`[updates, texts]`, mean over seeds of bits per byte less those before the first update."""
    texts = (FIRST, *LATER)
    each = [
        [[one.bits[text] - of_seed["before"][0].bits[text] for text in texts] for one in of_seed[name]]
        for of_seed in runs.values()
    ]
    return np.array(each).mean(0)
