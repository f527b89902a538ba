"""The model card, written from run folders and the model's own files alone.

`write_card` gathers what the stages left behind, fills the template through `huggingface_hub.ModelCard` and writes
``README.md``, the picture of the block and ``.eval_results/``. The text is in ``templates/model_card.md``, which a
user can replace; this file prepares the values. Each sentence follows from a fact in the run or in the model's files:
what no stage measured is listed under "Not measured", and what no file says is absent.
"""

import os
import re
from pathlib import Path
from typing import Any

from deepseek_model_cards.benchmarks import compare_to_chance
from deepseek_model_cards.card.architecture import architecture_rows, introduction, parameter_rows
from deepseek_model_cards.card.block_picture import draw_block
from deepseek_model_cards.card.data_cards import cleaning_rows
from deepseek_model_cards.card.hand_edits import write_signed
from deepseek_model_cards.card.license_facts import License, find_license
from deepseek_model_cards.card.limits import limit_lines, not_measured
from deepseek_model_cards.card.loading_examples import loading_ways, measuring_command
from deepseek_model_cards.card.markdown_cells import escape_cells
from deepseek_model_cards.card.metadata import (
    Measured,
    build_metadata,
    is_hub_id,
    results_of_final_model,
    write_eval_results,
)
from deepseek_model_cards.card.model_facts import ModelFacts, read_facts
from deepseek_model_cards.card.parameter_table import try_to_count
from deepseek_model_cards.energy_use import energy_sentence
from deepseek_model_cards.eu.fields import read_forms
from deepseek_model_cards.stage_rows import data_row, stage_row, total_seconds
from deepseek_model_cards.summary_table import pair_results
from deepseek_model_cards.wording import format_seconds, format_value, label_dataset, label_figure
from deepseek_records.leaks import scrub
from deepseek_records.lineage import Lineage, read_lineage
from deepseek_records.output_paths import check_output, make_output
from deepseek_records.stages import Stage, merged_versions
from deepseek_records.summary import Result

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
PICTURE = "block.png"
# Of the training stages; a task says of itself that it is one of safety.
_STAGE_SAFETY = re.compile(r"safety|harm|toxic", re.IGNORECASE)


def write_card(
    run_path: str | Path,
    *,
    name: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    template: str | Path | None = None,
    output: str | Path | None = None,
    model_path: Path | None = None,
) -> Path:
    """Write the model card of a run, or of a model's folder, and return its path.

    Args:
        run_path: A stage's folder, the parent of several, or a model's folder without a run.
        name: The model's name; the folder's name by default.
        license: The license of the weights, as the Hub spells it; by default what the base model's card states, if
            that is known.
        repo_id: Where the model will lie on the Hub, for the loading examples.
        template: A Jinja template in place of ours; it gets the same values.
        output: The folder for ``README.md``, ``block.png`` and ``.eval_results/``; the run's own by default.
        model_path: The model's folder where it is not in the run; the last stage's by default.

    Raises:
        FileNotFoundError: There is no finished run and no model, or no such template.
        FileExistsError: A ``README.md`` with somebody's edits is in the way.
        ValueError: Several models, metadata that the Hub would refuse, or a faulty template.
    """
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id or "some/name")
    except HFValidationError:
        raise ValueError(f"repo_id: got {repo_id!r}, expected user/name") from None
    path = Path(run_path)
    target = check_output(output) if output else path
    lineage = read_lineage(path)
    facts = read_facts(model_path or lineage.model_path)
    name = " ".join((name or _name_from(path, repo_id, lineage)).split())
    license_found = find_license(license, folder=facts.path, base=facts.base or lineage.base)
    made_here = any("deepseek-moe" in stage.environment.versions for stage in lineage.stages.values())
    metadata = build_metadata(lineage, name=name, facts=facts, license=license_found, is_made_here=made_here)
    place = repo_id or _place_from(target, facts.path)
    values = describe_run(lineage, name=name, place=place, facts=facts, license=license_found, target=target)
    values["cleanings"] = cleaning_rows(lineage, None if repo_id else target)
    values["documents"] = [] if repo_id else _documents_near(target)
    if template is not None:
        check_template(Path(template), known=set(values) | set(metadata.to_dict()))
    # from_template fills {{ card_data }} itself and gives the template every metadata field; ours come on top.
    card = ModelCard.from_template(metadata, template_path=str(template or TEMPLATE), **values)
    write_signed(make_output(target) / "README.md", re.sub(r"\n{3,}", "\n\n", str(card)))
    if values["picture"]:
        draw_block(facts.config, target / PICTURE)
    write_eval_results(lineage, target)
    return target / "README.md"


def _documents_near(target: Path) -> list[tuple[str, str]]:
    """What `deepseek-moe document` left beside the card, or in ``documents`` there: titles and links."""
    folders = (target, target / "documents")
    return [
        (form.title, path.relative_to(target).as_posix())
        for form in read_forms().values()
        for path in (folder / f"{form.file}.md" for folder in folders)
        if path.is_file()
    ]


def check_template(path: Path, known: set[str]) -> None:
    """Refuse a template with a fault in it, an unknown variable, or no place for the metadata.

    Args:
        path: The template.
        known: The variables that it may use, beside ``card_data``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is faulty; jinja would leave an unknown variable blank without a word.
    """
    from jinja2 import Environment, TemplateSyntaxError, meta

    if not path.is_file():
        raise FileNotFoundError(f"--template: got {path}, expected a file")
    try:
        used = meta.find_undeclared_variables(Environment().parse(path.read_text(encoding="utf-8")))
    except (TemplateSyntaxError, UnicodeDecodeError) as error:
        line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise ValueError(f"--template: {path}{line}: {error}") from None
    if unknown := sorted(used - known - {"card_data"}):
        raise ValueError(f"--template: got {unknown[0]!r} in {path}, expected one of {', '.join(sorted(known))}")
    if "card_data" not in used:
        raise ValueError(f"--template: got {path} without '{{{{ card_data }}}}', expected it between two lines of ---")


def _name_from(path: Path, repo_id: str | None, lineage: Lineage) -> str:
    if repo_id:
        return repo_id.split("/")[-1]
    folder = path.resolve()
    if not lineage.stages:
        return folder.name
    return f"deepseek-moe-{folder.parent.name if folder == lineage.model_path else folder.name}"


def _place_from(target: Path, model_path: Path | None) -> str:
    """The model's folder as seen from the card's; a stand-in where it lies elsewhere."""
    if model_path is None:
        return "path/to/model"
    relative = os.path.relpath(model_path.resolve(), target.resolve())
    if relative == ".":
        return "."
    return "path/to/model" if relative.startswith("..") else f"./{Path(relative).as_posix()}"


def describe_run(
    lineage: Lineage, *, name: str, place: str, facts: ModelFacts, license: License, target: Path
) -> dict[str, Any]:
    """Return the values that the template is filled with.

    Args:
        lineage: The model's stages.
        name: The model's name.
        place: Its Hub id, or its folder as seen from the card.
        facts: What its folder says.
        license: The license as far as it is known.
        target: The folder of the card.
    """
    stages = lineage.stages
    table = try_to_count(facts.path)
    finals = results_of_final_model(lineage)
    benchmarks = [found for found in finals if found.result.task and not found.result.is_safety]
    values: dict[str, Any] = {
        "name": name,
        "introduction": introduction(lineage, facts, table),
        "picture": PICTURE if facts.is_drawn else None,
        "architecture": architecture_rows(facts, table),
        "parameters": parameter_rows(facts, table),
        "data": [data_row(stage, row) for stage in stages.values() for row in stage.data],
        "stages": [stage_row(stage) for stage in stages.values()],
        "total_time": format_seconds(total_seconds(stages)),
        "energy": energy_sentence(list(stages.values())),
        "benchmarks": [_benchmark_row(found.result) for found in benchmarks],
        "benchmark_commands": _measuring_lines(benchmarks, place),
        "left_out": sorted(f"{stage}: measured {model}" for stage, model in lineage.left_out.items()),
        "safety": [row for stage in stages.values() for row in pair_results(_safety_results(stage))],
    }
    notes = {
        f"{label_dataset(row)}: {row.does_not_show}"
        for stage in stages.values()
        for row in _safety_results(stage)
        if row.does_not_show
    }
    tables = escape_cells(values, ("architecture", "parameters", "data", "benchmarks", "safety"))
    for row in values["stages"]:
        row.update(escape_cells(row, ("results", "checks")))
    return {
        **values,
        **tables,
        "safety_notes": sorted(notes),
        "limits": limit_lines(lineage, finals),
        "not_measured": not_measured(lineage),
        "loading": loading_ways(facts, place, _base_for(facts, target)),
        "license_reason": license.reason,
        "versions": ", ".join(f"{key} {value}" for key, value in merged_versions(stages).items()),
        "citation": _citation(name, lineage, facts),
    }


def _base_for(facts: ModelFacts, target: Path) -> str | None:
    """An adapter's base model as the card's code names it: its Hub id, or its folder as seen from the card."""
    base = facts.base
    if base is None or is_hub_id(base):
        return base
    if not Path(base).is_dir():
        return "path/to/base"
    relative = Path(os.path.relpath(Path(base).resolve(), target.resolve()))
    # Far away, its path would tell how somebody's disk is laid out.
    return "path/to/base" if relative.parts[:2] == ("..", "..") else relative.as_posix()


def _safety_results(stage: Stage) -> list[Result]:
    return [row for row in stage.results if row.is_safety or (not row.task and _STAGE_SAFETY.search(row.metric))]


def _benchmark_row(row: Result) -> dict[str, str]:
    return {
        "dataset": label_dataset(row),
        "metric": label_figure(row),
        "value": format_value(row.value, row.stderr),
        "n": format_value(row.n),
        "shots": format_value(row.num_fewshot),
        "chance": format_value(row.chance),
        "reading": compare_to_chance(row),
    }


def _measuring_lines(found: list[Measured], place: str) -> list[str]:
    """By stage: whose prompts and aggregation its figures follow, and the command that measures them again."""
    stages = {measured.stage.name: measured.stage for measured in found}
    lines = []
    for stage in stages.values():
        rows = [measured.result for measured in found if measured.stage is stage]
        version = stage.environment.versions.get("deepseek-moe", "(version not recorded)")
        harness = "; ".join(dict.fromkeys(row.harness or f"deepseek-moe {version}" for row in rows))
        tasks = list(dict.fromkeys(row.task for row in rows if row.task))
        command = measuring_command(stage, tasks, place)
        labels = "; ".join(dict.fromkeys(label_dataset(row) for row in rows))
        lines.append(f"{labels}: {harness}" + (f". To measure again: `{command}`" if command else ""))
    return lines


def _citation(name: str, lineage: Lineage, facts: ModelFacts) -> str:
    """An entry for BibTeX; empty where nothing is known of the model's making."""
    notes = []
    if lineage.stages and facts.path is not None:
        notes.append("trained with deepseek-moe" if lineage.final else "trained with transformers")
    if facts.is_drawn:
        notes.append("architecture after DeepSeek-AI, DeepSeek-V3 Technical Report, arXiv:2412.19437")
    if bases := [scrub(base) for base in (lineage.base or facts.base,) if base]:
        notes.append(f"made from {bases[0]}")
    if not notes:
        return ""
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "model"
    title = name.translate({ord(letter): None for letter in "{}\\"})
    return f"@misc{{{key},\n  title = {{{title}}},\n  note = {{{'; '.join(notes)}}}\n}}"
