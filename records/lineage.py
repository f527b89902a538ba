"""Which stages of a run made its model, and which evaluations measured that model and no other.

The card, the report and the upload describe one model. A parent folder may hold several runs, so each stage is linked
to the one it started from by what it recorded: the path of its model. Stages that made models apart from one another
are several models, and are refused in one line.
"""

import filecmp
from dataclasses import dataclass, field, replace
from pathlib import Path

from deepseek_records.leaks import scrub
from deepseek_records.run_files import is_own_run
from deepseek_records.run_folder import MODEL_FOLDER, RunFolder
from deepseek_records.stages import MODEL_MARKS, Stage, read_stages

# Stages that begin without a model: the setting `model` is a preset there.
_FROM_SCRATCH = ("tokenizer", "pretrain")


@dataclass(frozen=True)
class Lineage:
    """One model: what made it and what measured it.

    Args:
        stages: The stages that belong to it, in the order they ran; unfinished ones too.
        final: The stage that made it; None where none of them left a model.
        base: What its first stage started from, as that stage recorded it; None for a model made from scratch.
        evaluated: The model of an evaluation alone, as recorded, where no stage left a model.
        left_out: Evaluations of other models, by the stage's name: what they measured.
        folder: The model's folder where there is no run at all.
    """

    stages: dict[str, Stage]
    final: Stage | None
    base: str | None = None
    evaluated: str | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def model_path(self) -> Path | None:
        """The folder of the model; None where no stage left one."""
        return self.folder if self.final is None else self.final.run.model_path


def read_lineage(run_path: str | Path) -> Lineage:
    """Return the one model that a run folder is about.

    Args:
        run_path: A stage's folder, the parent of several, or a model's folder without a run.

    Raises:
        FileNotFoundError: There is neither a finished run nor a model.
        ValueError: It holds several models that were not made from one another.
    """
    path = Path(run_path)
    if is_model_folder(path) and not RunFolder(path).is_finished:
        run = path.resolve().parent
        if path.resolve().name == MODEL_FOLDER and RunFolder(run).is_finished:
            return trace_lineage(read_stages(run))  # The model of a run: its making is recorded one level above.
        return Lineage({}, None, folder=path)
    try:
        return trace_lineage(read_stages(path))
    except FileNotFoundError:
        models = sorted(child.name for child in path.iterdir() if is_model_folder(child)) if path.is_dir() else []
        if not models:
            raise
        raise ValueError(
            f"run: got {path} with the models {', '.join(models)} and no run, expected one model; pass one of them, "
            f"for example {path / models[0]}"
        ) from None


def read_whole_lineage(run_path: str | Path) -> Lineage:
    """Return the one model that a run folder is about, with the runs elsewhere that it was made from.

    Args:
        run_path: As for `read_lineage`.

    Raises:
        FileNotFoundError: As for `read_lineage`.
        ValueError: As for `read_lineage`, or a run elsewhere cannot be read.
    """
    lineage = read_lineage(run_path)
    stages, base = dict(lineage.stages), lineage.base
    seen = {stage.run.path.resolve() for stage in stages.values()}
    while lineage.final is not None and (folder := _run_of(base)) is not None and folder not in seen:
        seen.add(folder)
        (stage,) = read_stages(folder).values()
        name = stage.name if stage.name not in stages else f"{stage.name} of {folder.name}"
        while name in stages:
            name = f"{name}, before"
        stages = {name: replace(stage, name=name), **stages}
        base = source_of(stage)
    return replace(lineage, stages=stages, base=base)


def _run_of(model: str | None) -> Path | None:
    """The finished run that left a model, resolved; None where the path leads to none."""
    path = Path(model or "").expanduser()
    if not model or not path.is_dir():
        return None
    path = path.resolve()
    folders = [path, path.parent] if is_model_folder(path) else [path]
    return next((one for one in folders if is_own_run(one) and RunFolder(one).is_finished), None)


def is_model_folder(path: Path) -> bool:
    """Tell whether a folder holds a model or an adapter itself.

    Args:
        path: The folder.
    """
    return any((path / name).is_file() for name in MODEL_MARKS)


def trace_lineage(stages: dict[str, Stage]) -> Lineage:
    """Return the one model that stages are about.

    Args:
        stages: What `read_stages` gave.

    Raises:
        ValueError: They are about several models.
    """
    makers = {name: stage for name, stage in stages.items() if stage.has_model}
    parents = {name: find_parent(stage, makers) for name, stage in makers.items()}
    leaves = [makers[name] for name in makers if name not in parents.values()]
    if len(leaves) > 1:
        raise _several(leaves, "were not made from one another")
    if not leaves:
        return _evaluation_alone(stages)
    chain = [leaves[0].name]
    while (parent := parents[chain[0]]) is not None and parent not in chain:
        chain.insert(0, parent)
    left_out, measured = {}, []
    for name, stage in stages.items():
        if name in makers:
            continue
        model = source_of(stage)
        if stage.kind == "evaluate" and stage.is_finished and find_parent(stage, makers) is None:
            left_out[name] = scrub(model or "an unnamed model")
        else:
            measured.append(name)
    order = sorted([*chain, *measured], key=list(stages).index)
    order.sort(key=lambda name: chain.index(name) if name in chain else -1 if _is_before(stages[name]) else len(chain))
    base = source_of(makers[chain[0]])
    return Lineage({name: stages[name] for name in order}, leaves[0], base, left_out=left_out)


def _is_before(stage: Stage) -> bool:
    return stage.kind in _FROM_SCRATCH


def _evaluation_alone(stages: dict[str, Stage]) -> Lineage:
    """No stage left a model: evaluations of one model, or stages whose model was not kept."""
    evaluations = [stage for stage in stages.values() if stage.kind == "evaluate" and stage.is_finished]
    models = {source_of(stage) for stage in evaluations}
    if len(models) > 1:
        raise _several(evaluations, "evaluate different models")
    trained = [source_of(stage) for stage in stages.values() if stage.is_finished and stage not in evaluations]
    base = next((source for source in trained if source), None)
    return Lineage(dict(stages), None, base, evaluated=models.pop() if models else None)


def _several(stages: list[Stage], why: str) -> ValueError:
    names = ", ".join(stage.run.path.name for stage in stages)
    first = stages[0].run.path
    return ValueError(
        f"run: got {len(stages)} runs in {first.parent} that {why} ({names}), expected one model; pass one of them, "
        f"for example {first}"
    )


def source_of(stage: Stage) -> str | None:
    """Return the model that a stage started from or measured, as it was named; None where it began without one.

    Args:
        stage: A stage.
    """
    if _is_before(stage):
        return None
    summary = stage.run.summary if stage.is_finished else None
    settings = stage.run.settings if stage.settings else {}
    named = [summary.model, summary.base_model] if summary else []
    named += [settings.get("adapter"), settings.get("model_name_or_path"), settings.get("model")]
    if stage.kind == "evaluate" and settings.get("adapter"):
        return str(settings["adapter"])  # What was measured is the adapter's model.
    return next((str(name) for name in named if name), None)


def find_parent(stage: Stage, makers: dict[str, Stage]) -> str | None:
    """Return the name of the stage whose model a stage started from or measured, None where it is none of them.

    A path that is there decides by where it leads. One that is not, because the folder was moved, or that leads to
    another copy, counts as the stage of that name; a copy must hold the same weights.

    Args:
        stage: A stage.
        makers: The stages that left a model, by name.
    """
    name = source_of(stage)
    if name is None:
        return None
    others = {other: made for other, made in makers.items() if made.run.path != stage.run.path}
    path = Path(name).expanduser()
    if path.exists():
        resolved = path.resolve()
        for other, made in others.items():
            if resolved.is_relative_to(made.run.path.resolve()):
                return other
    parts = path.parts[:-1] if path.name in ("model", "adapter") else path.parts
    for other, made in others.items():
        if parts and parts[-1] == made.run.path.name:
            if path.exists():
                return other if _same_weights(path, made.run.model_path) else None
            # owner/name is a Hub id, unless the folders are called so.
            is_hub_id = name.count("/") == 1 and parts == path.parts
            return None if is_hub_id and parts[-2:] != made.run.path.resolve().parts[-2:] else other
    return None


def _same_weights(path: Path, model_path: Path) -> bool:
    folder = path / "model" if (path / "model").is_dir() else path
    names = sorted(file.name for file in model_path.glob("*.safetensors"))
    if names != sorted(file.name for file in folder.glob("*.safetensors")):
        return False
    _, different, missing = filecmp.cmpfiles(folder, model_path, names, shallow=False)
    return not different and not missing
