"""One self-contained ``report.html`` on a run: curves, expert load, rewards, benchmarks, samples, settings.

Reads run folders only and draws nothing that no stage logged. No requests, so the file can be mailed or committed as
it is, and no script but the browser of benchmark items, for those who ask for it. It reads from a phone to a wide
screen, light and dark: tables stack where they have no room, and nothing scrolls sideways. `summary_table` is
importable from here too.
"""

import math
from pathlib import Path
from typing import Any

from deepseek_model_cards.benchmarks import compare_to_chance
from deepseek_model_cards.card.metadata import results_of_final_model
from deepseek_model_cards.card.parameter_table import try_to_count
from deepseek_model_cards.report.benchmark_section import benchmark_section
from deepseek_model_cards.report.item_browser import pack_items
from deepseek_model_cards.report.training_sections import pair_values, training_sections
from deepseek_model_cards.stage_rows import data_row, describe_machine, stage_row, total_seconds
from deepseek_model_cards.summary_table import summary_rows, summary_table
from deepseek_model_cards.wording import format_count, format_seconds, format_value, label_dataset, label_metric
from deepseek_records.lineage import Lineage, read_lineage
from deepseek_records.run_folder import write_text
from deepseek_records.stages import Stage, merged_versions
from deepseek_records.summary import Sample

__all__ = ["summary_table", "write_report"]

TEMPLATE = Path(__file__).parent / "templates" / "report.html"


def write_report(run_path: str | Path, output: str | Path, *, with_items: bool = False) -> Path:
    """Write the report of a run and return its path.

    Args:
        run_path: A stage's folder, or the parent of several.
        output: The HTML file.
        with_items: Carry every benchmark item with its prompt and answer, to search in. Off where the file is made
            public: tests whose answers lie about are soon trained on.

    Raises:
        FileNotFoundError: There is no finished run.
    """
    import jinja2

    lineage = read_lineage(run_path)
    stages = lineage.stages
    first = next(stage for stage in stages.values() if stage.is_finished)
    # A model that was only evaluated here has no training to miss.
    sections = [] if set(stages) == {"evaluate"} else training_sections(stages)
    # autoescape: generations and names are text from outside and must not become markup.
    environment = jinja2.Environment(autoescape=True, loader=jinja2.FileSystemLoader(TEMPLATE.parent))
    template = environment.get_template(TEMPLATE.name)
    page = template.render(
        title=f"Run report: {Path(run_path).resolve().name}",
        subtitle=f"{(first.environment.started or 'start not recorded')[:16].replace('T', ' ')}, "
        f"{describe_machine(first.environment)}, {format_seconds(total_seconds(stages))} in all",
        tiles=_tiles(lineage),
        rows=summary_rows(run_path),
        sections=[*sections, benchmark_section(lineage)],
        samples=_samples(stages),
        items=_pack_items(stages) if with_items else "",
        data=[data_row(stage, row) for stage in stages.values() for row in stage.data],
        stages=[stage_row(stage) for stage in stages.values()],
        versions=", ".join(f"{key} {value}" for key, value in merged_versions(stages).items()),
        footer="Written by deepseek-moe from the run folder alone.",
    )
    write_text(Path(output), page)
    return Path(output)


def _pack_items(stages: dict[str, Stage]) -> str:
    """The items of the last stage that answered any."""
    packed = [pack_items(stage.run.path) for stage in stages.values() if stage.is_finished]
    return next((items for items in reversed(packed) if items), "")


def _tiles(lineage: Lineage) -> list[dict[str, str]]:
    tiles = []
    stages = lineage.stages
    table = try_to_count(lineage.model_path)
    if table and table.total:
        share = (
            f"{format_count(table.active)} active per token ({table.active / table.total:.0%})" if table.active else ""
        )
        tiles.append({"name": "parameters", "value": format_count(table.total), "note": share})
    for stage in stages.values():
        for pair in pair_values(stage.results):
            tile = _change_tile(pair)
            if tile:
                tiles.append(tile)
    for row in (found.result for found in results_of_final_model(lineage)):
        if row.task and row.is_share and not row.is_safety:
            note = compare_to_chance(row).partition(" (")[0]
            tiles.append({"name": label_dataset(row), "value": f"{row.value:.1%}", "note": note})
    checks = [check.passed for stage in stages.values() for check in stage.checks]
    if checks:
        tiles.append(
            {"name": "targets met", "value": f"{sum(checks)} of {len(checks)}", "note": "see the table below"}
        )
    return tiles


def _change_tile(row: dict[str, Any]) -> dict[str, str] | None:
    """Return a tile on a metric that has a before and an after, for the metrics a reader asks for first."""
    if row["metric"] not in ("bits_per_byte", "reward") or not (row.get("before") and row.get("after")):
        return None
    before, after = row["before"][0], row["after"][0]
    change = f"{(after - before) / abs(before):+.1%}" if before else f"{after - before:+.3f}"
    name = f"{label_metric(row['metric'])}, {row['dataset']}"
    return {"name": name, "value": change, "note": f"{format_value(before)} to {format_value(after)}"}


def _samples(stages: dict[str, Stage]) -> list[dict[str, Any]]:
    """What was written under each prompt over time: stage by stage, before and after each."""
    samples: dict[str, dict[str, Any]] = {}
    for number, stage in enumerate(stages.values()):
        for row in stage.samples:
            sample = samples.setdefault(row.prompt, {"prompt": row.prompt, "completions": []})
            when = f"{row.when} {stage.name}" if row.when else f"after {stage.name}"
            if row.step is not None:
                when = f"{stage.name}, step {row.step:,}"
            sample["completions"].append({"when": when, "text": row.completion, "order": _order(row, number)})
    for sample in samples.values():
        sample["completions"].sort(key=lambda one: one["order"])
    return list(samples.values())


def _order(row: Sample, stage_number: int) -> tuple[float, float]:
    """Stages in order; in each what was written before, then step by step, then after."""
    return stage_number, -1.0 if row.when == "before" else math.inf if row.step is None else row.step
