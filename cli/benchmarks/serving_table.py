"""The tables and the picture of `deepseek-moe bench serving`."""

from pathlib import Path
from typing import Any

_LEGEND_SIZE = 8


def format_tables(figures: dict[str, Any]) -> str:
    """Return the tables of generation and scoring.

    Args:
        figures: As `serving.run` collects them.
    """
    parts = [_format_rates(figures["generation"], "tokens_per_second", "tokens/s", figures["prompts"])]
    parts.append(_format_latencies(figures["generation"]))
    parts.append(_format_scoring(figures["scoring"], figures["scored"]))
    parts += [f"{name}: left out ({row['absent']})" for name, row in _absent(figures).items()]
    return "\n\n".join(parts)


def _absent(figures: dict[str, Any]) -> dict[str, Any]:
    return {
        name: row
        for kinds in (figures["generation"], figures["scoring"])
        for name, row in kinds.items()
        if "absent" in row
    }


def _present(kinds: dict[str, Any]) -> dict[str, Any]:
    return {name: row for name, row in kinds.items() if "absent" not in row}


def _clients(kinds: dict[str, Any]) -> list[str]:
    return max(([*row] for row in _present(kinds).values()), key=len)


def _format_rates(kinds: dict[str, Any], key: str, unit: str, num_prompts: int) -> str:
    clients = _clients(kinds)
    lines = [f"| {unit} at clients | {' | '.join(clients)} | same text |", "| --- |" + " --- |" * (len(clients) + 1)]
    for name, row in _present(kinds).items():
        cells = [f"{row[number][key]:.0f}" if number in row else "" for number in clients]
        num_equal = min(cell["num_equal"] for cell in row.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {num_equal:.0f} of {num_prompts} |")
    return "\n".join(lines)


def _format_latencies(kinds: dict[str, Any]) -> str:
    clients = _clients(kinds)
    lines = [f"| answer p50 / p95 / p99, s | {' | '.join(clients)} |", "| --- |" + " --- |" * len(clients)]
    for name, row in _present(kinds).items():
        cells = [_times(row[number]) if number in row else "" for number in clients]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _times(cell: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    return " / ".join(f"{cell[f'p{percent}_s'] * scale:.{digits}f}" for percent in (50, 95, 99))


def _format_scoring(kinds: dict[str, Any], num_prompts: int) -> str:
    present = _present(kinds)
    if len(present) < 2:
        return "scoring: left out"
    on, off = present["batching on"], present["batching off"]
    lines = [
        "| clients | on, requests/s | off, requests/s | on / off | on p50 / p95 / p99, ms | off, ms | equal |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for number in on:
        rate, other = on[number]["requests_per_second"], off[number]["requests_per_second"]
        num_equal = min(on[number]["num_equal"], off[number]["num_equal"])
        lines.append(
            f"| {number} | {rate:.0f} | {other:.0f} | {rate / other:.2f} | {_times(on[number], 1000, 0)} | "
            f"{_times(off[number], 1000, 0)} | {num_equal:.0f} of {num_prompts} |"
        )
    return "\n".join(lines)


def draw(figures: dict[str, Any], path: Path) -> None:
    """Draw how rate and latency grow with the clients.

    Args:
        figures: As `serving.run` collects them.
        path: Where to.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11.5, 3.6), layout="constrained")
    generation, scoring = _present(figures["generation"]), _present(figures["scoring"])
    _plot(axes[0], generation, "tokens_per_second", "generation, tokens per second")
    _plot(axes[1], generation, "p95_s", "generation, seconds to the whole answer (p95)")
    _plot(axes[2], scoring, "requests_per_second", "scoring in Triton, requests per second")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _plot(axis: Any, kinds: dict[str, Any], key: str, title: str) -> None:
    for name, row in kinds.items():
        clients = [int(number) for number in row]
        values = [cell[key] for cell in row.values()]
        if len(values) == 1:
            axis.axhline(values[0], color="gray", linestyle="--", linewidth=1.2, label=name)
        else:
            axis.plot(clients, values, marker="o", markersize=3.5, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64])
    axis.set_xlabel("clients at once")
    axis.set_title(title, fontsize=9)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=_LEGEND_SIZE, frameon=False)
