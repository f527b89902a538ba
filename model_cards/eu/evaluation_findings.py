"""What evaluations of this very model tell: benchmarks, bias, robustness and safety, limits, and what is missing."""

from deepseek_model_cards.benchmarks import compare_to_chance
from deepseek_model_cards.card.limits import limit_lines, not_measured
from deepseek_model_cards.card.metadata import Measured
from deepseek_model_cards.eu.findings import Finding, Found, Source, one
from deepseek_model_cards.eu.run_records import RunRecords
from deepseek_model_cards.wording import format_value, label_dataset, label_figure
from deepseek_records.run_folder import SUMMARY_FILE


def _figure(measured: Measured, file: str, key: str) -> Finding:
    row = measured.result
    notes = [f"n {row.n:,}"] if row.n is not None else []
    notes += [f"{row.num_fewshot}-shot"] if row.num_fewshot is not None else []
    notes += [compare_to_chance(row)] if row.chance is not None else []
    text = f"{label_dataset(row)}, {label_figure(row)}: {format_value(row.value, row.stderr)}"
    named = [name for name in ("value", "stderr", "n") if getattr(row, name) is not None]
    return one(f"{text} ({', '.join(notes)})" if notes else text, file, *(f"{key}.{name}" for name in named))


def _figures(records: RunRecords, *, is_safety: bool) -> Found:
    rows = [found for found in records.results() if found[0].result.is_safety is is_safety]
    findings = [_figure(*found) for found in rows]
    notes = dict.fromkeys(
        (found[0].result.does_not_show, found[1], found[2]) for found in rows if found[0].result.does_not_show
    )
    findings += [one(f"what a figure leaves open: {note}", file, f"{key}.does_not_show") for note, file, key in notes]
    measured = {found[0].stage.name for found in rows}
    unsure = [f"{name} ({why})" for name, why in records.not_compared.items() if name in measured]
    lacks = f"whether these weights were measured by {', '.join(unsure)}" if unsure else ""
    return Found(tuple(findings), lacks)


def benchmarks(records: RunRecords) -> Found:
    """Return the figures of the final model with their errors."""
    return _figures(records, is_safety=False)


def safety(records: RunRecords) -> Found:
    """Return the figures on bias, robustness, refusals and harm."""
    return _figures(records, is_safety=True)


def limits(records: RunRecords) -> Found:
    """Return the limits that follow from results, and what was not measured."""
    stages = [stage for stage in records.lineage.stages.values() if stage.is_finished]
    if not stages:
        return Found()
    sources = tuple(Source(records.of_stage(stage, SUMMARY_FILE)) for stage in stages)
    lines = limit_lines(records.lineage, [measured for measured, _, _ in records.results()])
    if lacking := not_measured(records.lineage):
        lines.append(f"not measured: {'; '.join(lacking)}")
    return Found(tuple(Finding(line, sources) for line in lines))
