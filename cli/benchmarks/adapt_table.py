"""The figures and tables of ``deepseek-moe bench adapt``, from what was measured of each model.

A change is after minus before on the same documents or questions, averaged over seeds. Its error is

    sqrt(error over documents of the mean over seeds ^2 + variance over seeds / seeds)

so both another draw of documents and another seed are allowed for.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_cli.benchmarks.adapt_measures import MeasuredModel
from deepseek_records.statistics import mean_with_error, ratio_with_error
from deepseek_training.knowledge.tail_figures import changes, describe_tail, mean_counts

# Figures of tasks that have an ideal and no right answers.
BIAS_FIGURES = {
    "crows_pairs": ("pct_stereotype",),
    "winobias": ("gap",),
    "bbq": ("bias_score_ambig", "bias_score_disambig", "acc_ambig", "acc_disambig"),
}
Pair = tuple[float, float | None]


@dataclasses.dataclass(frozen=True)
class Trained:
    """One adapted model.

    Attributes:
        measured: What was found.
        num_trained: Parameters that trained.
        cpu_s: Seconds of the processor that the run took, its own measurements included.
        kept_step: The step whose weights it has.
        stopped_at: The step at which general text was being forgotten; None where it was not.
    """

    measured: MeasuredModel
    num_trained: int
    cpu_s: float
    kept_step: int
    stopped_at: int | None


def summarize(
    before: MeasuredModel, trained: Mapping[str, Mapping[str, Sequence[Trained]]], *, general: str
) -> dict[str, Any]:
    """Return all figures as plain values: by domain and method, and of the model before.

    Args:
        before: The model that all begin with.
        trained: By domain and method, one for each seed.
        general: Name of the replayed text.
    """
    found: dict[str, Any] = {
        "general": general,
        "languages": before.languages,
        "before": {
            "bits_per_byte": {
                name: ratio_with_error(bits, before.num_bytes[name]) for name, bits in before.bits.items()
            },
            "acc": {name: mean_with_error(list(hits.values())) for name, hits in before.hits.items()},
            "bias": _bias([before]),
            "tail": {domain: describe_tail(counts) for domain, counts in before.tail.items()},
        },
        "domains": {},
    }
    for domain, methods in trained.items():
        found["domains"][domain] = {method: _method(before, runs, domain) for method, runs in methods.items()}
    return found


def _method(before: MeasuredModel, runs: Sequence[Trained], domain: str) -> dict[str, Any]:
    models = [one.measured for one in runs]
    counts = mean_counts(model.tail[domain] for model in models)
    return {
        "num_trained": runs[0].num_trained,
        "cpu_s": mean_with_error([one.cpu_s for one in runs]),
        "kept_step": mean_with_error([float(one.kept_step) for one in runs]),
        "num_stopped": sum(one.stopped_at is not None for one in runs),
        "bits_per_byte": {name: bits_change(before, models, name) for name in before.bits},
        "acc": {name: hits_change(before, models, name) for name in before.hits},
        "bias": _bias(models),
        "tail": describe_tail(counts),
        "tail_change": changes(before.tail[domain], counts),
    }


def bits_change(before: MeasuredModel, models: Sequence[MeasuredModel], name: str) -> Pair:
    """Return the change of a source's bits per byte.

    Args:
        before: The first model.
        models: The same method's, one for each seed.
        name: The source.
    """
    sizes = before.num_bytes[name]
    each = [np.subtract(model.bits[name], before.bits[name]) for model in models]
    value, error = ratio_with_error(np.mean(each, axis=0).tolist(), sizes)
    return value, _join(error, [float(one.sum() / sum(sizes)) for one in each])


def hits_change(before: MeasuredModel, models: Sequence[MeasuredModel], name: str) -> Pair:
    """Return the change of a task's accuracy.

    Args:
        before: The first model.
        models: One for each seed.
        name: The task, or a field of it.
    """
    asked = [model.hits[name] for model in models if name in model.hits]
    each = [[hits[item] - hit for item, hit in before.hits[name].items()] for hits in asked]
    value, error = mean_with_error(np.mean(each, axis=0).tolist())
    return value, _join(error, [float(np.mean(one)) for one in each])


def _bias(models: Sequence[MeasuredModel]) -> dict[str, Pair]:
    found: dict[str, Pair] = {}
    models = [model for model in models if model.figures]
    for task, names in BIAS_FIGURES.items():
        for name in names:
            values = [model.figures[task][name] for model in models if name in model.figures.get(task, {})]
            if models and len(values) == len(models):
                errors = [model.figures[task].get(f"{name}_stderr") for model in models]
                known = [one for one in errors if one is not None]
                error = float(np.mean(known)) if len(known) == len(models) else None
                found[f"{task} {name}"] = float(np.mean(values)), _join(error, values)
    return found


def _join(error: float | None, seeds: Sequence[float]) -> float | None:
    over_seeds = mean_with_error(seeds)[1] if len(seeds) > 1 else 0.0
    return None if error is None or over_seeds is None else math.hypot(error, over_seeds)


def format_tables(figures: Mapping[str, Any]) -> str:
    """Return the tables as Markdown.

    Args:
        figures: From `summarize`.
    """
    parts = []
    for domain, methods in figures["domains"].items():
        parts += [f"Adapted to {domain}", "", _main_table(figures, methods), ""]
        parts += [f"Bias, adapted to {domain}", "", _bias_table(figures, methods), ""]
        parts += [f"Long tail of {domain}", "", _tail_table(figures, domain, methods), ""]
    return "\n".join(parts).rstrip()


def _main_table(figures: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    before = figures["before"]
    sources, tasks = list(before["bits_per_byte"]), list(before["acc"])
    tasks = [name for name in tasks if name not in BIAS_FIGURES]
    heads = [f"{name} ({figures['languages'][name]})" for name in sources] + tasks
    rows = [["before", "", "", "", *_pairs(before, sources, tasks, ".3f")]]
    for name, row in methods.items():
        stopped = f", {row['num_stopped']} stopped" if row["num_stopped"] else ""
        about = [f"{row['num_trained'] / 1e3:,.0f} k", f"{row['kept_step'][0]:.0f}{stopped}", f"{row['cpu_s'][0]:.0f}"]
        rows.append([name, *about, *_pairs(row, sources, tasks, "+.3f")])
    return _markdown(["method", "trained", "steps kept", "CPU s", *heads], rows)


def _pairs(row: Mapping[str, Any], sources: Sequence[str], tasks: Sequence[str], spec: str) -> list[str]:
    return [shown(row["bits_per_byte"][name], spec) for name in sources] + [
        shown(row["acc"][name], spec) for name in tasks
    ]


def _bias_table(figures: Mapping[str, Any], methods: Mapping[str, Any]) -> str:
    names = list(figures["before"]["bias"])
    rows = [["before", *(shown(figures["before"]["bias"][name], ".3f") for name in names)]]
    rows += [[method, *(shown(row["bias"][name], ".3f") for name in names)] for method, row in methods.items()]
    return _markdown(["method", *names], rows)


def _tail_table(figures: Mapping[str, Any], domain: str, methods: Mapping[str, Any]) -> str:
    rows = []
    for kind, first in figures["before"]["tail"][domain].items():
        named: list[tuple[str, Any, Any]] = [("before", first, {})]
        named += [(method, row["tail"][kind], row["tail_change"][kind]) for method, row in methods.items()]
        for method, tail, change in named:
            if "gap" in tail:
                changed = [shown(change.get(tail[end]), "+.3f") for end in ("head", "tail")]
                rows.append([f"{kind}, {method}", *changed, shown(tail["gap"], "+.3f"), shown(tail["drop"], "+.0%")])
    return _markdown(["kind, method", "change at the head", "change at the tail", "gap", "accuracy, tail"], rows)


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown(pair: Sequence[Any] | None, spec: str) -> str:
    """Return a figure with its error; nothing where there is none.

    Args:
        pair: Both.
        spec: Of the format.
    """
    if pair is None or pair[0] is None or not math.isfinite(pair[0]):
        return ""
    value, error = pair
    return format(value, spec) if error is None else f"{value:{spec}} ± {error:{spec.lstrip('+')}}"
