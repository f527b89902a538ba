"""The table a run ends with: what was measured before and after, and which targets were met.

The same rows fill the terminal's table and the report's, so both say the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_model_cards.wording import format_value, label_dataset, label_figure
from deepseek_records.lineage import read_lineage
from deepseek_records.stages import Stage
from deepseek_records.summary import Check, Result

COLUMNS = ("stage", "what", "before / baseline", "after", "target", "met")


@dataclass
class Row:
    """One line of the table; every field is ready text.

    Args:
        stage: Where it was measured.
        what: The metric and the data set.
        before: The value before the stage, else the named baseline.
        after: The value after it.
        target: What was demanded, empty where nothing was.
        met: ``yes`` or ``no``, empty where nothing was demanded.
    """

    stage: str
    what: str
    before: str = ""
    after: str = ""
    target: str = ""
    met: str = ""

    def cells(self) -> tuple[str, ...]:
        """Return the fields in the order of `COLUMNS`."""
        return self.stage, self.what, self.before, self.after, self.target, self.met


def pair_results(results: Sequence[Result]) -> list[dict[str, str]]:
    """Return results as ready text, what was measured before and after training in one row.

    Args:
        results: Figures of one stage.

    Returns:
        Rows with ``metric``, ``dataset``, ``before``, ``after`` and ``n``, in the order they were measured.
    """
    rows: dict[tuple[str | None, ...], dict[str, str]] = {}
    for result in results:
        row = rows.setdefault(
            (result.metric, result.dataset, result.split, result.task),
            {
                "metric": label_figure(result),
                "dataset": label_dataset(result),
                "before": "",
                "after": "",
                "n": format_value(result.n),
            },
        )
        shown = format_value(result.value, result.stderr)
        row["before" if result.when == "before" else "after"] = shown
        if result.baseline is not None and not row["before"]:
            row["before"] = f"{format_value(result.baseline)} ({result.baseline_name or 'baseline'})"
    return list(rows.values())


def check_rows(stage: Stage) -> list[Row]:
    """Return the targets a stage held itself to, as rows of the table.

    Args:
        stage: A stage; an unfinished one has none.
    """
    return [_check_row(stage.name, check) for check in stage.checks]


def summary_rows(run_path: str | Path) -> list[Row]:
    """Return the table's rows: stage by stage its results in the order they were measured, then its targets.

    Args:
        run_path: A stage's folder, or the parent of several.
    """
    rows = []
    for stage in read_lineage(run_path).stages.values():
        for pair in pair_results(stage.results):
            what = ", ".join(part for part in (pair["metric"], pair["dataset"]) if part)
            rows.append(Row(stage.name, what, pair["before"], pair["after"]))
        rows += check_rows(stage)
    return rows


def _check_row(stage: str, check: Check) -> Row:
    target = " ".join(part for part in (check.comparison, format_value(check.bound)) if part)
    met = "yes" if check.passed else "no"
    return Row(stage, check.name, after=format_value(check.value), target=target, met=met)


def summary_table(run_path: str | Path) -> str:
    """Return the closing table as text for a terminal.

    Args:
        run_path: A stage's folder, or the parent of several.

    Returns:
        Aligned columns, one line per metric or target, no trailing newline.

    Raises:
        FileNotFoundError: There is no finished run.
    """
    lines = [COLUMNS, *(row.cells() for row in summary_rows(run_path))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)
