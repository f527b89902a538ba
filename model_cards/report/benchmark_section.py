"""The report's part on benchmarks: scores with errors beside published ones, and accuracy by category or subject.

Called by ``report.py``. Groups are drawn one by one only where they hold enough questions to say
something; a run with ``--limit`` shows the categories instead.
"""

import json
from typing import Any

from deepseek_model_cards.benchmarks import PUBLISHED_NOTE, compare_to_chance, score_interval
from deepseek_model_cards.card.metadata import results_of_final_model
from deepseek_model_cards.report import charts
from deepseek_model_cards.wording import format_value, label_figure
from deepseek_records.lineage import Lineage
from deepseek_records.stages import Stage, is_number
from deepseek_records.statistics import share_interval
from deepseek_records.summary import Published, Result

# The smallest group worth a line of its own; below, an interval covers nearly everything.
_MIN_GROUP = 20
_MAX_GROUPS = 80


def benchmark_section(lineage: Lineage) -> dict[str, Any]:
    """Return the section as the template takes it.

    Args:
        lineage: The model's stages.
    """
    stages = lineage.stages
    found = (measured.result for measured in results_of_final_model(lineage))
    rows = [row for row in found if row.task]
    drawn = _score_charts(rows) + [chart for stage in stages.values() for chart in _group_charts(stage)]
    missing = ""
    if "evaluate" not in stages:
        missing = "This run has no evaluate stage."
    elif not stages["evaluate"].is_finished:
        missing = "The evaluate stage was begun and not finished."
    elif not rows:
        missing = "No stage logged a benchmark."
    return {
        "title": "Benchmarks",
        "note": "Where the interval covers the dashed line, the score is not evidence that the model knows anything.",
        "charts": drawn,
        "missing": missing,
        "table": _table(rows) if rows else None,
    }


def _table(rows: list[Result]) -> dict[str, Any]:
    published = [{score.by: score for score in row.published} for row in rows]
    names = list(dict.fromkeys(name for scores in published for name in scores))
    columns = ["benchmark", "score \u00b1 standard error", "95 % interval", "n", "shots", "against chance", *names]
    lines = [
        [
            _label(row),
            format_value(row.value, row.stderr),
            _interval_cell(row),
            format_value(row.n),
            format_value(row.num_fewshot),
            compare_to_chance(row) or "-",
            *(_published_cell(scores.get(name)) for name in names),
        ]
        for row, scores in zip(rows, published, strict=True)
    ]
    note = f"Published figures are not measured here. {PUBLISHED_NOTE}" if names else ""
    return {"columns": columns, "rows": lines, "note": note}


def _interval_cell(row: Result) -> str:
    interval = score_interval(row)
    return "-" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def _published_cell(score: Published | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.3f} ({score.remark})" if score.remark else f"{score.value:.3f}"


def _label(row: Result) -> str:
    style = f", {row.prompt_style} prompts" if row.prompt_style else ""
    return f"{row.label or row.dataset or row.task}, {label_figure(row)}{style}"


def _score_charts(rows: list[Result]) -> list[dict[str, str]]:
    drawn = []
    for row in rows:
        if not row.is_share or row.is_safety:
            continue
        drawn.append(
            {
                "label": f"{_label(row).replace(', ', chr(10), 1)}, n = {row.n or '?'}",
                "value": row.value,
                "interval": score_interval(row),
                "chance": row.chance,
                "published": {score.by: score.value for score in row.published},
            }
        )
    if not drawn:
        return []
    return [{"source": charts.benchmark_chart(drawn), "alt": "Benchmark scores with intervals, chance and published"}]


def _group_charts(stage: Stage) -> list[dict[str, str]]:
    """Accuracy by subject, or by category where subjects are too small, for every task that has such groups."""
    path = stage.run.path / "results.json"
    if not stage.is_finished or not path.is_file():
        return []
    drawn = []
    chances = {row.task: row.chance for row in reversed(stage.results)}
    for task, scores in json.loads(path.read_text(encoding="utf-8")).get("tasks", {}).items():
        for what in ("groups", "categories"):
            rows = _group_rows(scores.get(what) or {})
            if rows:
                source = charts.group_chart(rows, chance=chances.get(task))
                title = f"{task}: accuracy by {'subject' if what == 'groups' else 'category'}"
                drawn.append({"title": title, "source": source, "alt": title})
                break
    return drawn


def _group_rows(groups: dict[str, Any]) -> list[dict[str, Any]]:
    shares = {name: score for name, score in groups.items() if isinstance(score, dict) and is_number(score.get("acc"))}
    if not 2 <= len(shares) <= _MAX_GROUPS or min(score["n"] for score in shares.values()) < _MIN_GROUP:
        return []
    rows = [
        {
            "label": name.replace("_", " "),
            "value": score["acc"],
            "interval": share_interval(score["acc"], score["n"]),
        }
        for name, score in shares.items()
    ]
    return sorted(rows, key=lambda row: -row["value"])
