"""Before stage 1: clean, deduplicate, decontaminate, mask, split and describe text.

``deepseek-moe data`` calls `clean_data`. Two passes: the first looks at each document by itself, in any number of
processes, and keeps what it found in parts; the second compares all documents and writes the shards. A killed run goes
on with the parts it has, and the result does not depend on the number of processes.
"""

import dataclasses
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_records.run_folder import RunFolder
from deepseek_records.summary import Summary
from deepseek_training.data.cleaning.announcement import announce_sources
from deepseek_training.data.cleaning.contamination import ContaminationIndex
from deepseek_training.data.cleaning.decisions import decide
from deepseek_training.data.cleaning.language import known_languages
from deepseek_training.data.cleaning.passes import examine_all, fit_to_sources, hash_inputs, survey_all
from deepseek_training.data.cleaning.result import WORK_FOLDER, write_result
from deepseek_training.recipes.data import DataRecipe
from deepseek_training.recipes.loading import recipe_settings


def clean_data(
    recipe: DataRecipe,
    output: str | Path,
    benchmarks: Mapping[str, Sequence[tuple[str, str]]],
    *,
    workers: int = 1,
    overwrite: bool = False,
    is_dry: bool = False,
) -> Summary | None:
    """Clean what the recipe names and return the summary, or in a dry run None.

    Args:
        recipe: The settings.
        output: The run folder.
        benchmarks: By task, of each item its id and its text; none of them may be in the result.
        workers: Processes of the first pass.
        overwrite: Delete the run that the folder holds.
        is_dry: Say what would happen, what it needs and how long it takes, write nothing, and return None.

    Raises:
        FileExistsError: The folder holds another run.
        FileNotFoundError: A source is missing.
        ValueError: A setting or a source cannot be used, or nothing is left.
    """
    started = time.monotonic()
    settings = recipe_settings(recipe)
    run = RunFolder.check(output, settings) if is_dry and not overwrite else RunFolder(output)
    for code in recipe.languages:
        if code not in known_languages():
            known = ", ".join(sorted(known_languages()))
            raise ValueError(f"languages: got {code!r}, expected codes of {known}")
    tokenizer = _load_tokenizer(recipe.tokenizer) if recipe.tokenizer else None
    sources, trusted = survey_all(recipe)
    index = ContaminationIndex.build(benchmarks if "contamination" in recipe.filters else {})
    announce_sources(recipe, sources, index, run.path, is_dry=is_dry, workers=workers)
    if is_dry:
        return None
    run = RunFolder.create(output, settings, command="data", seed=recipe.seed, overwrite=overwrite)
    run.hold_to(**hash_inputs(sources, trusted, benchmarks, tokenizer))
    context = fit_to_sources(recipe, sources, trusted, index)
    work = run.path / WORK_FOLDER
    work.mkdir(exist_ok=True)
    parts = examine_all(sources, context, work, workers)
    decisions = decide(parts, recipe)
    summary = write_result(run.path, parts, decisions, context, sources, tokenizer)
    shutil.rmtree(work)
    return run.finish(dataclasses.replace(summary, seconds=round(time.monotonic() - started, 1)))


def _load_tokenizer(name: str) -> Any:
    """A tokenizer that can mark where documents begin or end; said before the work, which takes hours."""
    from deepseek_records.loading import load_tokenizer
    from deepseek_training.data.packing import encode_documents

    tokenizer = load_tokenizer(name, setting="tokenizer")
    encode_documents(["a"], tokenizer)
    return tokenizer
