"""The pictures of ``deepseek-moe bench adapt``: what each method learns and forgets, and the long tail."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from deepseek_cli.benchmarks.adapt_measures import MeasuredModel
from deepseek_cli.benchmarks.adapt_table import Trained
from deepseek_training.knowledge.tail_figures import describe_tail, mean_counts
from deepseek_training.knowledge.tail_picture import draw_tail

_MARKERS = "osD^v<>"


def draw(
    before: MeasuredModel,
    trained: Mapping[str, Mapping[str, Sequence[Trained]]],
    figures: Mapping[str, Any],
    folder: Path,
) -> None:
    """Write ``adapt.png`` and one ``long_tail_<domain>.png`` for each domain.

    Args:
        before: The model that all begin with.
        trained: By domain and method.
        figures: From `summarize`.
        folder: Where they go.
    """
    folder.mkdir(exist_ok=True)
    domains = figures["domains"]
    figure, panels = plt.subplots(
        1, len(domains), figsize=(5.6 * len(domains), 4.6), layout="constrained", squeeze=False
    )
    for axes, (domain, methods) in zip(panels[0], domains.items(), strict=True):
        _draw_methods(axes, domain, methods, figures["general"])
    panels[0][0].legend(fontsize=8)
    figure.savefig(folder / "adapt.png", dpi=110)
    plt.close(figure)
    for domain, methods in trained.items():
        method = "full" if "full" in methods else next(iter(methods))
        if not before.tail[domain]:
            continue
        counts = mean_counts(one.measured.tail[domain] for one in methods[method])
        moments = {"before": describe_tail(before.tail[domain]), "after": describe_tail(counts)}
        draw_tail(moments, folder / f"long_tail_{domain}.png", f"{domain}, {method}")


def _draw_methods(axes: Any, domain: str, methods: Mapping[str, Any], general: str) -> None:
    for number, (name, row) in enumerate(methods.items()):
        changes = row["bits_per_byte"]
        own = [pair for source, pair in changes.items() if source.split(":")[0] == domain]
        x = -sum(pair[0] for pair in own) / len(own)
        x_error = sum((pair[1] or 0) ** 2 for pair in own) ** 0.5 / len(own)
        y, y_error = changes[general]
        marker = _MARKERS[number % len(_MARKERS)]
        axes.errorbar(x, y, xerr=x_error, yerr=y_error or 0, fmt=marker, capsize=3, label=name)
    axes.axhline(0, color="gray", linewidth=0.8)
    axes.set_xlabel(f"learned of {domain}, bits per byte, mean of its sources")
    axes.set_ylabel(f"forgotten of {general}, bits per byte")
    axes.set_title(f"{domain}: right learns more, low forgets less")
