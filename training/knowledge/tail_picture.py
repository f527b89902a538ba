"""The picture of the long tail: bits per byte and accuracy by band, before and after a training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_training.knowledge.balance import BANDS
from deepseek_training.knowledge.tail_figures import WARNING_DROP

_LOOKS = {"before": ("tab:gray", "o"), "after": ("tab:blue", "s")}


def draw_tail(moments: Mapping[str, Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw the bands of each kind.

    Args:
        moments: By ``before`` and ``after``, from `describe_tail`.
        path: The PNG file; its folder is made.
        title: Above it all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds = list(moments["after"])
    figure = Figure(figsize=(5.2 * len(kinds), 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        for when, found in moments.items():
            _plot_bands(panels[0][column], found[kind], "bits_per_byte", when)
            _plot_relative(panels[1][column], found[kind], when)
        panels[0][column].set_title(kind)
        panels[0][column].set_ylabel("bits per byte")
        panels[1][column].set_ylabel("accuracy / that of the head - 1")
        panels[1][column].axhline(WARNING_DROP, color="tab:red", linestyle="--", linewidth=1)
        panels[1][column].annotate(
            f"{WARNING_DROP:.0%}",
            (0.02, WARNING_DROP),
            xycoords=("axes fraction", "data"),
            color="tab:red",
            va="bottom",
        )
        panels[1][column].set_xlabel("training documents that hold the word or name")
    panels[0][0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _plot_bands(axes: Any, found: Mapping[str, Any], figure: str, when: str) -> None:
    names = [name for name in BANDS if name in found["bands"]]
    values = [found["bands"][name][figure] for name in names]
    color, marker = _LOOKS[when]
    axes.errorbar(
        names, [one[0] for one in values], [one[1] or 0 for one in values], color=color, marker=marker, label=when,
        capsize=3,
    )  # fmt: skip


def _plot_relative(axes: Any, found: Mapping[str, Any], when: str) -> None:
    if "head" not in found or not found["bands"][found["head"]]["acc"][0]:
        return
    head = found["bands"][found["head"]]["acc"][0]
    names = [name for name in BANDS if name in found["bands"]]
    shares = [found["bands"][name]["acc"][0] / head - 1 for name in names]
    errors = [(found["bands"][name]["acc"][1] or 0) / head for name in names]
    color, marker = _LOOKS[when]
    axes.errorbar(names, shares, errors, color=color, marker=marker, capsize=3)
