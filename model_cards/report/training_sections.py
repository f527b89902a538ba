"""The report's sections on training: loss, held-out text, reward, the course of PPO, the experts' load.

Each draws what the stages logged and nothing else; a part without data says which stage would have brought it.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from deepseek_model_cards.report import charts
from deepseek_model_cards.stage_rows import stage_title
from deepseek_model_cards.wording import label_metric
from deepseek_records.stages import Stage
from deepseek_records.summary import Result

Section = dict[str, Any]
# The stages that learn from a reward.
_REWARDED = ("align", "grpo")
# What is drawn of PPO and GRPO: title, unit, and the lines by their names in ``metrics.jsonl``, of which the first
# that was logged counts.
_ALIGNMENT_FIGURES = (
    ("Loss parts", "mean of an update", (("policy", ("loss/policy_avg",)), ("value", ("loss/value_avg",)))),
    (
        *("Clip fraction", "share of tokens"),
        (("policy", ("policy/clipfrac_avg", "clip_ratio/region_mean")), ("value", ("val/clipfrac_avg",))),
    ),
    ("Entropy", "nats per token", (("policy", ("policy/entropy_avg", "entropy")),)),
    ("Length", "tokens per completion", (("completions", ("length_tokens", "completions/mean_length")),)),
    ("Completions that end", "share", (("with an end token", ("has_eos",)),)),
    ("Ratio", "new / old probability", (("mean", ("val/ratio",)),)),
)
# What is drawn of every training, one line per stage.
_COURSE_FIGURES = (
    ("Learning rate", "", ("learning_rate", "lr")),
    ("Gradient norm", "", ("grad_norm",)),
    ("Speed", "tokens per second", ("tokens_per_second",)),
)
# What the curves beside the heatmaps show: metric, title, unit.
_ROUTER_FIGURES = (
    ("load_imbalance", "Imbalance", "busiest expert / mean"),
    ("router_entropy", "Router entropy", "nats per token"),
    ("mean_experts_per_tok", "Experts per token", "mean number used"),
)


def training_sections(stages: dict[str, Stage]) -> list[Section]:
    """Return the sections as the template takes them.

    Args:
        stages: The model's stages.
    """
    makers = [_loss_section, _domain_section, _reward_section]
    if any(stage.kind in _REWARDED for stage in stages.values()):
        makers.append(_course_section)
    return [make(stages) for make in (*makers, _load_section)]


def _section(title: str, note: str, drawn: Sequence[dict[str, Any]], missing: str) -> Section:
    return {"title": title, "note": note, "charts": drawn, "missing": missing, "table": None}


def _absent(stages: dict[str, Stage], name: str, what: str, drawn: Sequence[dict[str, Any]]) -> str:
    """Say what a part lacks: its stage is not there, not finished, or logged nothing of the kind; else nothing."""
    if name not in stages:
        return f"This run has no {name} stage."
    if not stages[name].is_finished:
        return f"The {name} stage was begun and not finished."
    return "" if drawn else f"No stage logged {what}."


def pair_values(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return what was measured before and after in one row: ``before`` and ``after`` as (value, stderr).

    Args:
        results: Figures of one stage.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        key = (result.metric, result.dataset, result.split)
        row = rows.setdefault(key, {"metric": result.metric, "dataset": result.dataset or ""})
        row["before" if result.when == "before" else "after"] = (result.value, result.stderr)
        if result.baseline is not None:
            row["baseline"] = (result.baseline_name or "baseline", result.baseline)
    return list(rows.values())


def _loss_section(stages: dict[str, Stage]) -> Section:
    panels = []
    for stage in stages.values():
        lines = [(name, *stage.series(key)) for key, name in _loss_keys(stage)]
        if lines:
            panels.append({"title": stage_title(stage), "ylabel": _loss_unit(lines), "lines": lines})
    found = _draw(panels)
    course = (_course_panel(stages, *figure) for figure in _COURSE_FIGURES)
    found += _draw([panel for panel in course if panel["lines"]])
    note = "Training loss is in nats per token, of the mixed training batches; held-out text is measured apart."
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
    units = ["nats per token"] if has_loss or not has_bits else []
    return " / ".join([*units, *(["bits per byte"] if has_bits else [])])


def _domain_section(stages: dict[str, Stage]) -> Section:
    found = []
    for metric in ("bits_per_byte", "perplexity"):
        rows = [
            {**row, "label": f"{row['dataset']}\n({stage.name})"}
            for stage in stages.values()
            for row in pair_values(stage.results)
            if row["metric"] == metric
        ]
        found += _draw_bars(rows, label_metric(metric), f"{label_metric(metric)} before and after each stage")
    note = "Held-out text before and after each stage; lower is better. Bits per byte compare across tokenizers."
    return _section("General and domain text", note, found, _absent(stages, "adapt", "bits per byte", found))


def _draw_bars(rows: Sequence[dict[str, Any]], ylabel: str, alt: str) -> list[dict[str, Any]]:
    """Two groups of bars per chart, so that their figures can be read on a phone."""
    parts = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    return [{"source": charts.before_after_chart(part, ylabel), "alt": alt, "is_narrow": True} for part in parts]


def _reward_section(stages: dict[str, Stage]) -> Section:
    panels = []
    for stage in stages.values():
        parts = [key for key in stage.metric_keys() if key == "reward" or key.startswith("reward_")]
        lines = [(label_metric(key.removeprefix("reward_")), *stage.series(key)) for key in parts]
        if lines:
            panels.append({"title": "Reward by component", "ylabel": "mean reward of a batch", "lines": lines})
        if "kl" in stage.metric_keys():
            lines = [("KL to the reference", *stage.series("kl"))]
            title = "Distance from the reference"
            panels.append({"title": title, "ylabel": "KL, nats per completion", "lines": lines})
    found = _draw(panels)
    pairs = [row for stage in stages.values() for row in pair_values(stage.results)]
    pairs = [row for row in pairs if row["metric"].startswith("reward")]
    if pairs:
        rows = [{**row, "label": label_metric(row["metric"].removeprefix("reward_"))} for row in pairs]
        found += _draw_bars(rows, "mean reward, held-out prompts", "Mean reward on held-out prompts")
    note = "A rising reward with a runaway KL is a sign of a gamed measure, so both are shown."
    return _section("Reward", note, found, _absent(stages, _rewarded(stages), "a reward", found))


def _draw(panels: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One chart per panel, so that they stand side by side where there is room and below one another where not."""
    return [
        {"source": charts.line_chart(panel), "alt": f"{panel['title']} over steps", "is_narrow": True}
        for panel in panels
    ]


def _course_panel(stages: dict[str, Stage], title: str, unit: str, names: tuple[str, ...]) -> dict[str, Any]:
    found = [(stage.name, _first_series(stage, names)) for stage in stages.values()]
    lines = [(name, *series) for name, series in found if len(series[0]) > 1]
    return {"title": title, "ylabel": unit, "lines": lines}


def _first_series(stage: Stage, names: tuple[str, ...]) -> tuple[list[float], list[float]]:
    return next((series for series in map(stage.series, names) if series[0]), ([], []))


def _rewarded(stages: dict[str, Stage]) -> str:
    """The name of the stage that learned from a reward; ``align`` where there was none."""
    return next((stage.name for stage in stages.values() if stage.kind in _REWARDED), "align")


def _course_section(stages: dict[str, Stage]) -> Section:
    panels = []
    for stage in stages.values():
        if stage.kind not in _REWARDED:
            continue
        for title, unit, figures in _ALIGNMENT_FIGURES:
            lines = [(name, *_first_series(stage, keys)) for name, keys in figures]
            lines = [line for line in lines if line[1]]
            if lines:
                panels.append({"title": title, "ylabel": unit, "lines": lines})
    found = _draw(panels)
    note = (
        "How the policy moved. A clip fraction that stays high means steps too large; an entropy that falls to zero "
        "or a length that runs to its limit are signs of a collapsing policy."
    )
    return _section("Course of the alignment", note, found, _absent(stages, _rewarded(stages), "its course", found))


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
        found += _draw(panels)
    note = (
        "How the router spreads tokens: 1 is an even share, 0 an expert that is never chosen. Curves are means over "
        "the layers; the entropy of an even router is the logarithm of the number of experts."
    )
    return _section("Expert load", note, found, _absent(stages, "pretrain", "the experts' load", found))


def _router_panel(stages: dict[str, Stage], key: str, title: str, unit: str) -> dict[str, Any]:
    series = [(stage.name, *stage.series(key)) for stage in stages.values()]
    return {"title": title, "ylabel": unit, "lines": [line for line in series if len(line[1]) > 1]}
