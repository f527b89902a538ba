"""One self-contained ``report.html`` on a run: curves, expert load, rewards, benchmarks, samples, settings.

Reads run folders only and draws nothing that no stage logged: a part without data says which stage would have brought
it. No requests, so the file can be mailed or committed as it is, and no script but the browser of benchmark items, for
those who ask for it. `summary_table` is importable from
here too, for whoever ends a run with both.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deepseek_model_cards.benchmarks import compare_to_chance
from deepseek_model_cards.card.metadata import results_of_final_model
from deepseek_model_cards.card.parameter_table import try_to_count
from deepseek_model_cards.report import charts
from deepseek_model_cards.report.benchmark_section import benchmark_section
from deepseek_model_cards.report.item_browser import pack_items
from deepseek_model_cards.stage_rows import data_row, describe_machine, stage_row, stage_title, total_seconds
from deepseek_model_cards.summary_table import summary_rows, summary_table
from deepseek_model_cards.wording import format_count, format_seconds, format_value, label_dataset, label_metric
from deepseek_records.lineage import Lineage, read_lineage
from deepseek_records.run_folder import write_text
from deepseek_records.stages import Stage, merged_versions
from deepseek_records.summary import Result

__all__ = ["summary_table", "write_report"]

TEMPLATE = Path(__file__).parent / "templates" / "report.html"
Section = dict[str, Any]


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
    training: list[Callable[[dict[str, Stage]], Section]] = [
        _loss_section,
        _domain_section,
        _reward_section,
        _load_section,
    ]
    # A model that was only evaluated here has no training to miss.
    sections = [] if set(stages) == {"evaluate"} else [make(stages) for make in training]
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


def _section(title: str, note: str, drawn: list[dict[str, str]], missing: str) -> Section:
    return {"title": title, "note": note, "charts": drawn, "missing": missing, "table": None}


def _absent(stages: dict[str, Stage], name: str, what: str, drawn: list[dict[str, str]]) -> str:
    """Say what a part lacks: its stage is not there, not finished, or logged nothing of the kind; else nothing."""
    if name not in stages:
        return f"This run has no {name} stage."
    if not stages[name].is_finished:
        return f"The {name} stage was begun and not finished."
    return "" if drawn else f"No stage logged {what}."


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
        for pair in _pairs(stage.results):
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


def _pairs(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Join what was measured before and after: ``before`` and ``after`` as (value, stderr)."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        key = (result.metric, result.dataset, result.split)
        row = rows.setdefault(key, {"metric": result.metric, "dataset": result.dataset or ""})
        row["before" if result.when == "before" else "after"] = (result.value, result.stderr)
        if result.baseline is not None:
            row["baseline"] = (result.baseline_name or "baseline", result.baseline)
    return list(rows.values())


def _samples(stages: dict[str, Stage]) -> list[dict[str, Any]]:
    """Generations by stage and prompt, what was written before and after training under one prompt."""
    samples: dict[tuple[str, str], dict[str, Any]] = {}
    for stage in stages.values():
        for row in stage.samples:
            empty = {"stage": stage.name, "prompt": row.prompt, "completions": []}
            sample = samples.setdefault((stage.name, row.prompt), empty)
            sample["completions"].append({"when": row.when or "", "text": row.completion})
    return list(samples.values())


def _loss_section(stages: dict[str, Stage]) -> Section:
    panels = []
    for stage in stages.values():
        lines = [(name, *stage.series(key)) for key, name in _loss_keys(stage)]
        if lines:
            panels.append({"title": stage_title(stage), "ylabel": _loss_unit(lines), "lines": lines})
    found = [{"source": charts.line_charts(panels), "alt": "Loss over steps, one panel a stage"}] if panels else []
    note = "Training loss is in nats a token, of the mixed training batches; held-out text is measured apart."
    return _section("Loss", note, found, _absent(stages, "pretrain", "a loss", found))


def _loss_keys(stage: Stage) -> list[tuple[str, str]]:
    keys = [("loss", "training loss"), ("eval_loss", "held-out loss")]
    keys += [
        (key, f"held-out {key[5:-14]}".strip() + ", bits per byte") for key in stage.metric_keys() if _is_bpb(key)
    ]
    return [(key, name) for key, name in keys if len(stage.series(key)[0]) > 1]


def _is_bpb(key: str) -> bool:
    return bool(re.fullmatch(r"eval_(\w+_)?bits_per_byte", key))


def _loss_unit(lines: list[tuple[Any, ...]]) -> str:
    has_loss = any("loss" in name for name, *_ in lines)
    has_bits = any("bits" in name for name, *_ in lines)
    return "nats a token / bits a byte" if has_loss and has_bits else "bits a byte" if has_bits else "nats a token"


def _domain_section(stages: dict[str, Stage]) -> Section:
    found = []
    for metric in ("bits_per_byte", "perplexity"):
        rows = [
            {**row, "label": f"{row['dataset']}\n({stage.name})"}
            for stage in stages.values()
            for row in _pairs(stage.results)
            if row["metric"] == metric
        ]
        if rows:
            source = charts.before_after_chart(rows, label_metric(metric))
            found.append({"source": source, "alt": f"{label_metric(metric)} before and after each stage"})
    note = "Held-out text before and after each stage; lower is better. Bits per byte compare across tokenizers."
    return _section("General and domain text", note, found, _absent(stages, "adapt", "bits per byte", found))


def _reward_section(stages: dict[str, Stage]) -> Section:
    panels = []
    for stage in stages.values():
        parts = [key for key in stage.metric_keys() if key == "reward" or key.startswith("reward_")]
        lines = [(label_metric(key.removeprefix("reward_")), *stage.series(key)) for key in parts]
        if lines:
            panels.append({"title": "Reward by component", "ylabel": "mean reward of a batch", "lines": lines})
        if "kl" in stage.metric_keys():
            lines = [("KL to the reference", *stage.series("kl"))]
            panels.append({"title": "Distance from the reference", "ylabel": "KL, nats a completion", "lines": lines})
    found = [{"source": charts.line_charts(panels), "alt": "Reward components and KL over steps"}] if panels else []
    pairs = [row for stage in stages.values() for row in _pairs(stage.results) if row["metric"].startswith("reward")]
    if pairs:
        rows = [{**row, "label": label_metric(row["metric"].removeprefix("reward_"))} for row in pairs]
        source = charts.before_after_chart(rows, "mean reward")
        found.append({"title": "Held-out prompts", "source": source, "alt": "Mean reward on held-out prompts"})
    note = "What PPO was paid for. A rising reward with a runaway KL is a sign of a gamed measure, so both are shown."
    return _section("Reward", note, found, _absent(stages, "align", "a reward", found))


def _load_section(stages: dict[str, Stage]) -> Section:
    found = []
    for stage in stages.values():
        loads = stage.summary.tokens_per_expert if stage.summary else ()
        if loads:
            source = charts.heatmap(loads, [f"MoE layer {i + 1}" for i in range(len(loads))])
            alt = f"Load of each expert by layer: {json.dumps(loads)[:400]}"
            found.append({"title": stage_title(stage), "source": source, "alt": alt})
    panels = [panel for panel in (_router_panel(stages, *figure) for figure in _ROUTER_FIGURES) if panel["lines"]]
    if panels:
        alt = ", ".join(panel["title"] for panel in panels) + " over steps"
        found.append({"source": charts.line_charts(panels), "alt": alt})
    note = (
        "How the router spreads tokens: 1 is an even share, 0 an expert that is never chosen. Curves are means over "
        "the layers; the entropy of an even router is the logarithm of the number of experts."
    )
    return _section("Expert load", note, found, _absent(stages, "pretrain", "the experts' load", found))


# What the curves beside the heatmaps show: metric, title, unit.
_ROUTER_FIGURES = (
    ("load_imbalance", "Imbalance", "busiest expert / mean"),
    ("router_entropy", "Router entropy", "nats a token"),
    ("mean_experts_per_tok", "Experts a token", "mean number used"),
)


def _router_panel(stages: dict[str, Stage], key: str, title: str, unit: str) -> dict[str, Any]:
    series = [(stage.name, *stage.series(key)) for stage in stages.values()]
    return {"title": title, "ylabel": unit, "lines": [line for line in series if len(line[1]) > 1]}
