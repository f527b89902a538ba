"""The stages of a run, read back for the card, the report, the closing table and the upload.

A run path is either a parent folder whose subfolders are stages (``runs/demo/{pretrain,adapt,align,evaluate}``) or one
stage by itself. Everything shown later comes from here, so a number in a card is always a number in a run folder.
Texts are scrubbed of local paths and tokens as they are read, here and nowhere else. An unfinished stage is kept,
without its summary, so that readers can say what is missing.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_records.environment import Environment
from deepseek_records.leaks import scrub
from deepseek_records.run_folder import (
    ENVIRONMENT_FILE,
    METRICS_FILE,
    RECIPE_FILE,
    RunFolder,
)
from deepseek_records.summary import Check, DataUse, Result, Sample, Summary

MODEL_MARKS = ("config.json", "adapter_config.json")
STAGE_ORDER = (
    "tokenizer",
    "pretrain",
    "shrink",
    "upcycle",
    "adapt",
    "update",
    "distill",
    "sft",
    "dpo",
    "align",
    "grpo",
    "multimodal",
    "quantize",
    "evaluate",
)


@dataclass(frozen=True)
class Stage:
    """One stage as its folder tells it.

    Args:
        name: The folder's name within a parent, else the command that made it.
        run: The folder itself.
        settings: The resolved settings.
        environment: Versions, seed, commit, command line, machine.
        summary: What the stage ended with; None while unfinished.
        metrics: The logged rows, in order.
    """

    name: str
    run: RunFolder
    settings: dict[str, Any] = field(default_factory=dict)
    environment: Environment = field(default_factory=Environment)
    summary: Summary | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The command that made it, whatever its folder is called."""
        return self.environment.command or (self.summary.stage if self.summary else "") or self.name

    @property
    def has_model(self) -> bool:
        """True if it finished and left a model, or an adapter of one."""
        path = self.run.model_path
        return self.is_finished and any((path / name).is_file() for name in MODEL_MARKS)

    @property
    def is_finished(self) -> bool:
        """True once the stage wrote its summary."""
        return self.summary is not None

    @property
    def command_line(self) -> str:
        """The command as typed, program name first."""
        return " ".join(self.environment.argv)

    @property
    def results(self) -> tuple[Result, ...]:
        """The measured results."""
        return self.summary.results if self.summary else ()

    @property
    def checks(self) -> tuple[Check, ...]:
        """The bars the stage held itself to."""
        return self.summary.checks if self.summary else ()

    @property
    def data(self) -> tuple[DataUse, ...]:
        """The data sets the stage used."""
        return self.summary.data if self.summary else ()

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The texts the stage wrote."""
        return self.summary.samples if self.summary else ()

    @property
    def seconds(self) -> float | None:
        """How long the stage took, where it was recorded."""
        return self.summary.seconds if self.summary else None

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values of one logged metric.

        Args:
            key: The metric's name in ``metrics.jsonl``.

        Returns:
            Steps and values, equally long; a row without ``step`` counts as its position.
        """
        rows = [(row.get("step", i), row[key]) for i, row in enumerate(self.metrics) if is_number(row.get(key))]
        return [step for step, _ in rows], [value for _, value in rows]

    def metric_keys(self) -> list[str]:
        """Return every key logged anywhere in this stage, sorted."""
        return sorted({key for row in self.metrics for key in row})


def is_number(value: Any) -> bool:
    """Tell whether a JSON value is a number (a bool is none).

    Args:
        value: Anything `json` gives.
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_stages(run_path: str | Path) -> dict[str, Stage]:
    """Return the stages of a run by name, in the order they ran.

    Args:
        run_path: A stage's folder, or the parent of several.

    Returns:
        At least one finished stage; unfinished ones have no summary.

    Raises:
        FileNotFoundError: There is no such folder, or no finished run in it.
    """
    path = Path(run_path)
    if not path.is_dir():
        raise FileNotFoundError(f"run: got {path}, expected a run folder such as runs/demo")
    folders = [path] if _is_stage(path) else [child for child in path.iterdir() if _is_stage(child)]
    stages = [_read_stage(folder, is_alone=folder == path) for folder in folders]
    if not any(stage.is_finished for stage in stages):
        raise FileNotFoundError(f"run: {path} holds no finished run (no summary.json in it or one level below)")
    stages.sort(key=_order)
    return {stage.name: stage for stage in stages}


def _is_stage(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file() or RunFolder(folder).is_finished


def _order(stage: Stage) -> tuple[int, str]:
    known = STAGE_ORDER.index(stage.kind) if stage.kind in STAGE_ORDER else len(STAGE_ORDER)
    return known, stage.name


def _read_stage(folder: Path, *, is_alone: bool) -> Stage:
    run = RunFolder(folder)
    summary = run.read_summary(scrub) if run.is_finished else None
    environment = run.read_environment(scrub) if (folder / ENVIRONMENT_FILE).is_file() else Environment()
    name = folder.name
    if is_alone:
        name = (summary.stage if summary else "") or environment.command or folder.name
    return Stage(
        name=name,
        run=run,
        settings=scrub(run.settings) if (folder / RECIPE_FILE).is_file() else {},
        environment=environment,
        summary=summary,
        metrics=run.metrics if (folder / METRICS_FILE).is_file() else [],
    )


def merged_versions(stages: dict[str, Stage]) -> dict[str, str]:
    """Return the library versions of all stages; where two stages differ, both, joined by a slash.

    Args:
        stages: What `read_stages` gave.
    """
    versions: dict[str, list[str]] = {}
    for stage in stages.values():
        for name, version in stage.environment.versions.items():
            seen = versions.setdefault(name, [])
            if version not in seen:
                seen.append(version)
    return {name: " / ".join(seen) for name, seen in versions.items()}
