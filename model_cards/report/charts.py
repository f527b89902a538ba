"""The report's charts, each drawn by matplotlib and returned as two image sources that need no other file.

SVG inside a data URI: sharp at any size, no request, and no clash of element ids between charts. One source is for a
light page, one for a dark page; they differ in colors alone. Colors stay apart under the common forms of color
blindness, and every series is also named in a legend or at its axis. A chart is at most as wide as a column of the
page, so that its letters can be read on a phone.
"""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, EDGE = "#1f2933", "#616e7c", "#e4e7eb", "#9aa5b1"
SERIES = ("#2f6fb0", "#d9822b", "#2f855a", "#9b59b6", "#b83246", "#4a5568")
BASELINE, BEFORE = "#e0a5ad", "#b8c4d0"
# On the cells of a heatmap, whose colors are the same on a dark page.
CELL_INK, CELL_LIGHT = "#1f2934", "#fffffe"
# The same on a dark page. Series keep at least three to one against it, letters four and a half.
DARK = {
    **{INK: "#e6e9ed", MUTED: "#aeb8c4", GRID: "#37414b", EDGE: "#6b7683", BASELINE: "#b06d77", BEFORE: "#7d8a99"},
    **dict(zip(SERIES, ("#6aa9e9", "#f0a350", "#5fbf8a", "#c58fe0", "#f07c8e", "#a9b4c4"), strict=True)),
}
Source = dict[str, str]
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


def _figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple["Figure", Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _to_source(figure: "Figure") -> Source:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    light = buffer.getvalue().decode()
    dark = light
    for color, on_dark in DARK.items():
        dark = dark.replace(color, on_dark)
    start = "data:image/svg+xml;base64,"
    both = (("light", light), ("dark", dark))
    return {name: start + base64.b64encode(svg.encode()).decode() for name, svg in both}


def line_chart(panel: dict[str, Any]) -> Source:
    """Draw one panel of lines.

    Args:
        panel: ``title``, ``ylabel`` and ``lines``, a list of (name, xs, ys); ``xlabel`` where x is not a step.

    Returns:
        The sources for a light and a dark page.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, grid = _figure(4.3, 3.5)
        axes = grid[0][0]
        for i, (name, xs, ys) in enumerate(panel["lines"]):
            style = {"marker": "o", "markersize": 3.5} if len(xs) <= 12 else {}
            axes.plot(xs, ys, color=SERIES[i % len(SERIES)], linewidth=1.6, label=name, **style)
        axes.set_title(panel["title"])
        axes.set_xlabel(panel.get("xlabel", "step"))
        axes.set_ylabel(panel["ylabel"])
        _legend_below(axes, [name for name, *_ in panel["lines"]])
        if "xlabel" not in panel:
            axes.xaxis.get_major_locator().set_params(integer=True)
        return _to_source(figure)


def _legend_below(axes: "Axes", names: Sequence[str], offset: float = -0.2, **options: Any) -> None:
    """A legend below the axes, where it can cover nothing and makes the chart no wider."""
    longest = max(len(name) for name in names)
    columns = 1 if longest > 26 else 2 if longest > 14 else 4
    axes.legend(fontsize=8.5, loc="upper center", bbox_to_anchor=(0.5, offset), ncols=columns, **options)


def before_after_chart(rows: Sequence[dict[str, Any]], ylabel: str) -> Source:
    """Draw groups of bars, baseline, before and after, with their standard errors.

    Args:
        rows: ``label``, and where known ``before`` and ``after`` as (value, stderr or None) and ``baseline`` as
            (name, value).
        ylabel: What the bars measure.

    Returns:
        The sources for a light and a dark page.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, grid = _figure(max(4.3, 1.9 * len(rows) + 0.4), 3.5)
        axes = grid[0][0]
        names: dict[str, str] = {}
        for i, row in enumerate(rows):
            bars = _bars_of(row)
            for j, (name, color, value, stderr) in enumerate(bars):
                x = i + 0.4 * (j - (len(bars) - 1) / 2)
                axes.bar(x, value, width=0.36, color=color, yerr=stderr or 0, capsize=4, ecolor=INK)
                _write_above(axes, x, value + (stderr or 0), f"{value:.3f}")
                names[name] = color
        axes.set_xticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylabel(ylabel)
        axes.margins(y=0.16)
        axes.grid(axis="x", visible=False)
        _legend_of_bars(axes, names)
        return _to_source(figure)


def _bars_of(row: dict[str, Any]) -> list[tuple[str, str, float, float | None]]:
    """Name, color, value and error of each bar of a group."""
    bars = []
    if row.get("baseline"):
        bars.append((row["baseline"][0], BASELINE, row["baseline"][1], None))
    for key, color in (("before", BEFORE), ("after", SERIES[0])):
        if row.get(key):
            bars.append((key, color, *row[key]))
    return bars


def _write_above(axes: "Axes", x: float, y: float, text: str) -> None:
    style = {"textcoords": "offset points", "ha": "center", "va": "bottom", "fontsize": 9, "color": INK}
    axes.annotate(text, (x, y), xytext=(0, 4), **style)


def _legend_of_bars(axes: "Axes", names: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=name) for name, color in names.items()]
    lines = max(label.get_text().count("\n") for label in axes.get_xticklabels())
    _legend_below(axes, list(names), -0.12 - 0.06 * lines, handles=handles)


def heatmap(loads: Sequence[Sequence[float]], layer_names: Sequence[str]) -> Source:
    """Draw the load of every expert in every layer relative to an even share.

    Args:
        loads: One list per layer, one number per expert: tokens, or shares.
        layer_names: One name per layer.

    Returns:
        The sources for a light and a dark page. 1 (white) is an even share, 2 (red) twice that,
            0 (blue) an expert never chosen.
    """
    import matplotlib
    from matplotlib.colors import TwoSlopeNorm

    relative = [[value * len(row) / max(sum(row), 1e-12) for value in row] for row in loads]
    highest = max(2.0, *(max(row) for row in relative))
    widest = max(len(row) for row in relative)
    padded = [row + [float("nan")] * (widest - len(row)) for row in relative]
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure, grid = _figure(min(10.5, 3.0 + 0.42 * widest), 1.4 + 0.36 * len(relative))
        axes = grid[0][0]
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=highest)
        image = axes.pcolormesh(padded, cmap="RdBu_r", norm=norm, edgecolors=CELL_LIGHT, linewidth=0.6)
        axes.invert_yaxis()
        axes.set_yticks([i + 0.5 for i in range(len(relative))], layer_names)
        step = max(1, widest // 16)
        axes.set_xticks([i + 0.5 for i in range(0, widest, step)], range(0, widest, step))
        axes.set_xlabel("expert")
        if widest <= 16:
            _write_cells(axes, relative, norm)
        figure.colorbar(image, ax=axes, label="load / even share", ticks=[0, 1, highest], format="%.2g")
        return _to_source(figure)


def _write_cells(axes: "Axes", relative: Sequence[Sequence[float]], norm: Any) -> None:
    for y, row in enumerate(relative):
        for x, value in enumerate(row):
            color = CELL_INK if 0.25 < norm(value) < 0.8 else CELL_LIGHT
            axes.text(x + 0.5, y + 0.5, f"{value:.2f}", ha="center", va="center", fontsize=8, color=color)


def benchmark_chart(rows: Sequence[dict[str, Any]]) -> Source:
    """Draw benchmark scores with 95 % intervals and the chance level of each.

    Args:
        rows: ``label``, ``value`` and where known ``interval`` as (low, high), ``chance`` and ``published``, scores by
            name.

    Returns:
        The sources for a light and a dark page.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, grid = _figure(5.4, 1.5 + 0.62 * len(rows))
        axes = grid[0][0]
        for y, row in enumerate(rows):
            if row.get("interval"):
                axes.plot(row["interval"], [y, y], color=SERIES[0], linewidth=2.2, solid_capstyle="butt", zorder=3)
            axes.plot([row["value"]], [y], "o", color=SERIES[0], markersize=7, zorder=3)
            right = row["interval"][1] if row.get("interval") else row["value"]
            axes.text(right + 0.008, y, f"{row['value']:.1%}", ha="left", va="center", fontsize=10, weight="bold")
            if row.get("chance") is not None:
                axes.plot([row["chance"]] * 2, [y - 0.36, y + 0.36], color=SERIES[4], linestyle="--", linewidth=1.6)
        axes.plot([], [], "o-", color=SERIES[0], label="score, 95 % interval")
        axes.plot([], [], "--", color=SERIES[4], label="chance")
        _mark_published(axes, rows)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        published = [value for row in rows for value in row.get("published", {}).values()]
        highest = max(
            [row["interval"][1] if row.get("interval") else row["value"] for row in rows] + published + [0.3]
        )
        axes.set_xlim(-0.02, min(1.02, highest * 1.25))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", visible=False)
        _legend_below(axes, ["score, 95 % interval"], -0.35 / len(rows) - 0.04)
        return _to_source(figure)


def _mark_published(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    """Put a mark of its own shape where each published score lies."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("published", {})))
    for name, marker, color in zip(names, "Ds^v", SERIES[1:], strict=False):
        points = [(row["published"][name], y) for y, row in enumerate(rows) if name in row.get("published", {})]
        axes.plot(*zip(*points, strict=True), marker, color=color, markersize=6, fillstyle="none", label=name)


def group_chart(rows: Sequence[dict[str, Any]], chance: float | None = None) -> Source:
    """Draw accuracy by group, one line per group, with 95 % intervals.

    Args:
        rows: ``label``, ``value`` and ``interval`` as (low, high), in the order to draw, topmost first.
        chance: The chance level, drawn as a dashed line.

    Returns:
        The sources for a light and a dark page.
    """
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure, grid = _figure(5.4, 1.1 + 0.2 * len(rows))
        axes = grid[0][0]
        for y, row in enumerate(rows):
            axes.plot(row["interval"], [y, y], color=SERIES[0], linewidth=1.6, alpha=0.6, solid_capstyle="butt")
            axes.plot([row["value"]], [y], "o", color=SERIES[0], markersize=4.5)
        if chance is not None:
            axes.axvline(chance, color=SERIES[4], linestyle="--", linewidth=1.4, label="chance")
            _legend_below(axes, ["chance"], -1.0 / len(rows) - 0.02)
        axes.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=8.5)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.grid(axis="y", visible=False)
        return _to_source(figure)
