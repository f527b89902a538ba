"""The picture of ``deepseek-moe bench smaller``: size on disk against bits per byte, one labeled mark per variant.

Left is every variant; right those near the original or better, so close that errors show. Labels are put where they
hide no mark and no other label.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from deepseek_cli.benchmarks.smaller_variants import BOTH, CUT, HEALED, ORIGINAL, ROUNDED

_STYLES = {
    ORIGINAL: ("#3c4349", "o"),
    ROUNDED: ("#1668a6", "s"),
    CUT: ("#b0702a", "v"),
    HEALED: ("#2f8f4e", "^"),
    BOTH: ("#8a3fa0", "D"),
}
_FRONTIER = "#dde2e7"
_CLOSE = 1.01  # the right panel ends at this share of the original's bits per byte
# Points from the mark at which a label is tried, nearest first.
_OFFSETS = [
    (x, y) for far in (8, 15, 24, 36, 50, 66) for x in (far, -far, 0) for y in (far, -far, 0) if abs(x) + abs(y) > 8
]


class Drawn(Protocol):
    """What is drawn of a row."""

    name: str
    kind: str
    label: str
    num_bytes: int
    bits_per_byte: float
    difference_stderr: float
    is_on_frontier: bool


def draw_picture(rows: Sequence[Any], path: Path) -> None:
    """Draw both panels into one file.

    Args:
        rows: Each a `Drawn`, the original first.
        path: A ``.png``.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 5.2), dpi=110, constrained_layout=True)
    original = rows[0].bits_per_byte
    close = [row for row in rows if row.bits_per_byte <= _CLOSE * original]
    for axis, shown in zip(axes, (rows, close), strict=True):
        _draw(axis, rows, shown, original)
    axes[0].set_ylabel("bits per byte, held-out text")
    axes[0].set_title("every variant", fontsize=10)
    axes[1].set_title(
        f"at most {100 * (_CLOSE - 1):.0f} % worse than the original; bars: standard error, paired", fontsize=10
    )
    axes[0].legend(fontsize=8, loc="best")
    figure.canvas.draw()
    figure.set_layout_engine("none")  # it would move the axes under the labels
    for axis, shown in zip(axes, (rows, close), strict=True):
        _label(figure, axis, shown)
    figure.savefig(path)
    plt.close(figure)


def _draw(axis: Any, rows: Sequence[Drawn], shown: Sequence[Drawn], original: float) -> None:
    """Marks of one panel, the frontier and the original's level; the scale fits what is shown."""
    best = sorted((row for row in rows if row.is_on_frontier), key=lambda row: row.num_bytes)
    sizes, levels = [row.num_bytes / 1e6 for row in best], [row.bits_per_byte for row in best]
    values = [row.bits_per_byte for row in shown]
    spread = max(values) - min(values) or 0.01
    low, high = min(values) - 0.12 * spread, max(values) + 0.12 * spread
    # The smallest variant is worse the smaller it gets; up there nothing was measured, so the line ends at the edge.
    axis.step([sizes[0], *sizes], [high, *levels], where="post", color=_FRONTIER, linewidth=5, zorder=0)
    axis.axhline(original, color=_STYLES[ORIGINAL][0], linewidth=0.8, linestyle=":", zorder=0)
    for kind, (color, mark) in _STYLES.items():
        found = [row for row in shown if row.kind == kind]
        if not found:
            continue
        axis.errorbar(
            [row.num_bytes / 1e6 for row in found],
            [row.bits_per_byte for row in found],
            yerr=[row.difference_stderr for row in found],
            fmt=mark,
            color=color,
            markersize=6,
            capsize=3,
            label=kind,
        )
        for row in found:
            place = row.num_bytes / 1e6, row.bits_per_byte
            axis.annotate(row.label, place, color=color, fontsize=8, ha="left", va="bottom")
    all_sizes = [row.num_bytes / 1e6 for row in rows]
    axis.set_xscale("log")
    axis.set_xlim(min(all_sizes) / 1.25, max(all_sizes) * 1.25)
    axis.set_ylim(low, high)
    smallest, largest = axis.get_xlim()
    round_sizes = (n * 10.0**power for power in range(-3, 7) for n in (1, 2, 3, 5))
    ticks = [size for size in round_sizes if smallest <= size <= largest]
    axis.set_xticks(ticks, [f"{size:g}" for size in ticks])
    axis.minorticks_off()
    axis.set_xlabel("MB of weights on disk (log)")
    axis.grid(alpha=0.25)


def _label(figure: Any, axis: Any, shown: Sequence[Drawn]) -> None:
    """Move each label of a panel to the first place that hides nothing; a line leads back where it is far."""
    from matplotlib.transforms import Bbox

    renderer, frame = figure.canvas.get_renderer(), axis.get_window_extent()
    labels = list(axis.texts)
    marks = [axis.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in marks]
    for row in shown:
        ends = [(row.num_bytes / 1e6, row.bits_per_byte + sign * row.difference_stderr) for sign in (-1, 1)]
        (x, low), (_, high) = axis.transData.transform(ends)
        taken.append(Bbox.from_extents(x - 5, low, x + 5, high))
    if axis.get_legend():
        taken.append(axis.get_legend().get_window_extent(renderer))
    for label, (x, y) in zip(labels, marks, strict=True):
        box = label.get_window_extent(renderer)
        for right, up in _OFFSETS:
            left = x + right if right > 0 else x + right - box.width if right < 0 else x - box.width / 2
            bottom = y + up - box.height / 2
            place = Bbox.from_bounds(left, bottom, box.width, box.height)
            is_inside = place.x0 >= frame.x0 and place.x1 <= frame.x1 and place.y0 >= frame.y0 and place.y1 <= frame.y1
            if is_inside and not any(place.overlaps(other) for other in taken):
                break
        taken.append(place)
        label.set_position(axis.transData.inverted().transform((left, bottom)))
        if max(abs(right), abs(up)) > 14:
            corner = (min(max(x, place.x0), place.x1), min(max(y, place.y0), place.y1))
            ends = axis.transData.inverted().transform([(x, y), corner])
            axis.plot(ends[:, 0], ends[:, 1], color=label.get_color(), linewidth=0.6, zorder=1, label="_")
