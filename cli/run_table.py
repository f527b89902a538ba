"""Several finished runs in one table: every figure with its interval, the spread over seeds, and what differs.

Called by ``deepseek-moe evaluate --table``. Evaluations and training runs may stand side by side; a figure that a run
did not measure is a dash.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepseek_model_cards.benchmarks import score_interval
from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Result

# Settings that name what is compared, or where it lies.
_NAMES_OF_RUNS = ("seed", "model", "model_name_or_path", "samples")


def format_table(folders: Sequence[str | Path]) -> str:
    """Return the table.

    Args:
        folders: Run folders of any stage.

    Raises:
        FileNotFoundError: A folder holds no finished run.
    """
    runs = [RunFolder(folder) for folder in folders]
    columns = [_figures(run) for run in runs]
    seeds = _groups_over_seeds(runs)
    lines = [f"run {number}  {folder}" for number, folder in enumerate(folders, start=1)]
    header = ["figure", *(f"run {number}" for number in range(1, len(runs) + 1)), *(name for name, _ in seeds)]
    table = [header]
    for key in dict.fromkeys(key for column in columns for key in column):
        cells = [_cell(column[key]) if key in column else "-" for column in columns]
        spread = [
            _spread([columns[index][key].value for index in group if key in columns[index]]) for _, group in seeds
        ]
        table.append([", ".join(key), *cells, *spread])
    widths = [max(len(row[index]) for row in table) for index in range(len(header))]
    lines += [
        "",
        *("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table),
    ]
    notes = [*_other_questions(runs), *_other_settings(runs)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _figures(run: RunFolder) -> dict[tuple[str, ...], Result]:
    rows = [row for row in run.summary.results if row.when != "before"]
    named = ((row.label or row.dataset, row.split, f"{row.metric}{_direction(row)}") for row in rows)
    return {tuple(part for part in names if part): row for names, row in zip(named, rows, strict=True)}


def _direction(row: Result) -> str:
    return " (lower is better)" if row.higher_is_better is False else ""


def _cell(row: Result) -> str:
    interval = score_interval(row)
    return f"{row.value:.4f}" + ("" if interval is None else f" [{interval[0]:.4f}, {interval[1]:.4f}]")


def _groups_over_seeds(runs: Sequence[RunFolder]) -> list[tuple[str, list[int]]]:
    """Runs that are equal but for their seed, by the heading of their column."""
    groups: dict[str, list[int]] = {}
    for index, run in enumerate(runs):
        settings = {name: value for name, value in run.settings.items() if name != "seed"}
        groups.setdefault(repr(sorted(settings.items(), key=str)), []).append(index)
    seeds = [run.environment.seed for run in runs]
    several = [group for group in groups.values() if len({seeds[index] for index in group}) == len(group) > 1]
    return [(f"mean (sd) of runs {', '.join(str(index + 1) for index in group)}", group) for group in several]


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.4f} ({statistics.stdev(values):.4f})" if len(values) > 1 else "-"


def _other_questions(runs: Sequence[RunFolder]) -> list[str]:
    """A line for each task whose prompts differ between the runs: other questions, or other shots."""
    hashes: dict[str, set[str]] = {}
    for run in runs:
        for name, value in run.inputs.items():
            if name.startswith("questions_of_"):
                hashes.setdefault(name.removeprefix("questions_of_"), set()).add(value)
    return [
        f"{task}: not the same prompts in all runs (questions or shots)" for task in hashes if len(hashes[task]) > 1
    ]


def _other_settings(runs: Sequence[RunFolder]) -> list[str]:
    """A line for each setting that differs, with its value in each run."""
    settings = [run.settings for run in runs]
    names = dict.fromkeys(name for values in settings for name in values)
    return [
        f"{name}: " + " | ".join(_short(values.get(name)) for values in settings)
        for name in names
        if name not in _NAMES_OF_RUNS and any(values.get(name) != settings[0].get(name) for values in settings)
    ]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:56]} ..."
