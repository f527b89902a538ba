"""All that the documents are filled from: the stages that made the model, its own files, and what measured it.

A record that belongs to another model is left out and named: an evaluation of other weights, or an earlier stage that
was run again after the model had been made from it.
"""

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from deepseek_model_cards.card.metadata import Measured, is_hub_id, is_of_final_model, results_of_final_model
from deepseek_model_cards.card.model_facts import ModelFacts, read_facts
from deepseek_model_cards.card.parameter_table import ParameterTable, try_to_count
from deepseek_model_cards.eu.model_identity import why_another_model
from deepseek_records.leaks import scrub
from deepseek_records.lineage import Lineage, read_whole_lineage, source_of
from deepseek_records.run_folder import SUMMARY_FILE
from deepseek_records.stages import Stage
from deepseek_records.summary import DataUse

# Runs beside the model's that made none.
_NOT_TRAINING = ("evaluate", "explain", "data", "data graph")


@dataclass(frozen=True)
class RunRecords:
    """What is known of one model.

    Args:
        root: The run's folder, which files are named from.
        lineage: What made and measured the model, runs elsewhere included.
        facts: What its folder says.
        table: Its parameters; None where its files do not tell them.
        left_out: Records that belong to another model, by name: why they are not used.
        not_compared: Evaluations of which it is not known whether they measured these weights, by name: why.
        is_base_told: Whether the provider says which model it was made from, whose own documents then tell of it.
    """

    root: Path
    lineage: Lineage
    facts: ModelFacts
    table: ParameterTable | None
    left_out: dict[str, str] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)
    is_base_told: bool = False

    @property
    def stages(self) -> list[Stage]:
        """The finished stages that made the model, in the order they ran."""
        return [one for one in self.lineage.stages.values() if one.is_finished and one.kind not in _NOT_TRAINING]

    @property
    def unfinished(self) -> list[str]:
        """The names of stages that were begun and not finished."""
        return [one.name for one in self.lineage.stages.values() if not one.is_finished]

    @property
    def base(self) -> str | None:
        """The model that the first stage started from, without its folder; None for a model made from scratch."""
        base = self.lineage.base or self.facts.base
        return None if base is None else str(scrub(base))

    @property
    def missing_past(self) -> str:
        """What is not recorded of how the model began; empty where everything is, or where it began on the Hub."""
        if not self.lineage.stages:
            return "how the model was made, for no run is recorded beside it"
        base = self.lineage.base or self.facts.base
        if base is None or is_hub_id(base) or self.is_base_told:
            return ""
        return f"what {self.base} was made from and with, for its run is not here"

    def of_stage(self, stage: Stage, name: str = SUMMARY_FILE) -> str:
        """Return how a stage's file is called in the documents.

        Args:
            stage: The stage.
            name: The file in its folder.
        """
        path = stage.run.path / name
        if path.resolve().is_relative_to(self.root.resolve()):
            return path.resolve().relative_to(self.root.resolve()).as_posix()
        return f"{stage.run.path.resolve().name}/{name}"

    def of_model(self, name: str) -> str:
        """Return how a file of the model is called in the documents.

        Args:
            name: The file in the model's folder.
        """
        if self.lineage.final is not None:
            return self.of_stage(self.lineage.final, f"{self.lineage.final.run.model_path.name}/{name}")
        return name

    def training_data(self) -> Iterator[tuple[Stage, int, DataUse]]:
        """Yield what the model was trained on: the stage, the place in its summary's ``data``, the data set."""
        for stage in self.stages:
            for place, row in enumerate(stage.data):
                if row.used_for == "training":
                    yield stage, place, row

    def results(self) -> list[tuple[Measured, str, str]]:
        """Return the final model's figures, each with its file and its place in ``results``."""
        found = []
        for one in results_of_final_model(self.lineage):
            place = next(place for place, row in enumerate(one.stage.results) if row is one.result)
            found.append((one, self.of_stage(one.stage), f"results.{place}"))
        return found


def read_records(run_path: str | Path) -> RunRecords:
    """Return what is known of a run's model.

    Args:
        run_path: A stage's folder, the parent of several, or a model's folder without a run.

    Raises:
        FileNotFoundError: There is neither a finished run nor a model.
        ValueError: Several models, no model, or a file that cannot be read.
    """
    root = Path(run_path)
    lineage = read_whole_lineage(root)
    if lineage.model_path is None and lineage.evaluated is None:
        kinds = ", ".join(sorted({stage.kind for stage in lineage.stages.values()}))
        raise ValueError(
            f"run: got {root} without a model ({kinds}), expected the run of a model or of its evaluation"
        )
    lineage, left_out = _without_replaced(lineage)
    left_out |= {name: f"it measured another model ({model})" for name, model in lineage.left_out.items()}
    not_compared = {}
    for stage in [one for one in lineage.stages.values() if one.kind == "evaluate" and one.is_finished]:
        if not is_of_final_model(lineage, stage):
            left_out[stage.name] = "it measured the model of an earlier stage"
            continue
        difference, unknown = why_another_model(stage, lineage.model_path)
        if difference:
            left_out[stage.name] = difference
        elif unknown:
            not_compared[stage.name] = unknown
    kept = {name: stage for name, stage in lineage.stages.items() if name not in left_out}
    path = lineage.model_path
    return RunRecords(
        root, replace(lineage, stages=kept), read_facts(path), try_to_count(path), left_out, not_compared
    )


def _without_replaced(lineage: Lineage) -> tuple[Lineage, dict[str, str]]:
    """Leave out what stands before a stage that began before it: it was run again, and is not what was built on."""
    makers = [stage for stage in lineage.stages.values() if stage.is_finished and stage.kind not in _NOT_TRAINING]
    left_out: dict[str, str] = {}
    first = 0
    for place in range(1, len(makers)):
        before, after = (_begin(stage) for stage in makers[place - 1 : place + 1])
        if before and after and before > after:
            first = place
    for stage in makers[:first]:
        left_out[stage.name] = f"it was run again after {makers[first].name}, which was made from an earlier run of it"
    if first:
        lineage = replace(lineage, base=source_of(makers[first]))
    return lineage, left_out


def _begin(stage: Stage) -> datetime.datetime | None:
    try:
        return datetime.datetime.strptime(stage.environment.started or "", "%Y-%m-%dT%H:%M:%S%z")
    except ValueError:
        return None
