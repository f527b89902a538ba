"""The passes over the sources: a look at every file, a fit, and the filters that look at one document."""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_records.hashes import hash_rows, hash_tokenizer
from deepseek_training.data.cleaning.contamination import ContaminationIndex
from deepseek_training.data.cleaning.documents import Document
from deepseek_training.data.cleaning.examine import Context
from deepseek_training.data.cleaning.fit import fit_context, sample_documents
from deepseek_training.data.cleaning.parts import BATCH_DOCUMENTS, begin, make_part
from deepseek_training.data.cleaning.sources import Source, read_documents, survey
from deepseek_training.data.cleaning.workers import map_in_order
from deepseek_training.recipes.data import DataRecipe, SourceSettings


def survey_all(recipe: DataRecipe) -> tuple[list[Source], Source | None]:
    """Return the sources and the trusted text, each file looked at once.

    Args:
        recipe: The settings.
    """
    sources = [survey(settings, recipe.encoding) for settings in recipe.source_settings]
    if recipe.trusted is None:
        return sources, None
    return sources, survey(
        SourceSettings(path=recipe.trusted, name="trusted", column=recipe.trusted_column), recipe.encoding
    )


def hash_inputs(
    sources: Sequence[Source],
    trusted: Source | None,
    benchmarks: Mapping[str, Sequence[tuple[str, str]]],
    tokenizer: Any = None,
) -> dict[str, str]:
    """Return hashes of what the result is made of, for `RunFolder.hold_to`.

    Args:
        sources: The sources.
        trusted: The trusted text.
        benchmarks: The benchmarks' items.
        tokenizer: The tokenizer.
    """
    hashes = {f"source {source.settings.name}": source.sha256 for source in sources}
    if trusted is not None:
        hashes["trusted"] = trusted.sha256
    if tokenizer is not None:
        hashes["tokenizer"] = hash_tokenizer(tokenizer)
    hashes["benchmarks"] = hash_rows([[task, list(map(list, items))] for task, items in sorted(benchmarks.items())])
    return hashes


def fit_to_sources(
    recipe: DataRecipe, sources: Sequence[Source], trusted: Source | None, index: ContaminationIndex
) -> Context:
    """Return what the filters need, fitted to samples of the sources.

    Args:
        recipe: The settings.
        sources: The sources.
        trusted: Clean text, where there is any.
        index: The benchmarks.

    Raises:
        ValueError: A source holds no document.
    """
    samples: dict[str, list[Document]] = {}
    with _bar("reading", "char") as bar:
        for source in [*sources, *([trusted] if trusted is not None else [])]:
            name = str(source.settings.name)
            size = recipe.fit_documents
            found = sample_documents(read_documents(source, recipe.encoding), size, bar.update)
            if not any(document.text.strip() for document in found):
                raise ValueError(f"sources: {source.settings.path} is empty; it holds no text")
            samples["" if source is trusted else name] = found
    trusted_documents = samples.pop("", None)
    return fit_context(samples, trusted_documents, recipe, index)


def examine_all(sources: Sequence[Source], context: Context, work: Path, workers: int) -> list[Path]:
    """Apply the filters to every document, and return the parts; those that are there are kept.

    Args:
        sources: The sources.
        context: What was fitted.
        work: Folder of the parts.
        workers: Processes.
    """
    parts: list[Path] = []

    def tasks() -> Iterator[tuple[Path, list[Document]]]:
        for number, batch in enumerate(_batches(sources, context.recipe.encoding)):
            parts.append(work / f"part-{number:06d}.parquet")
            if not parts[-1].exists():
                yield parts[-1], batch
            bar.update(len(batch))

    with _bar("filtering", "doc") as bar:
        for _ in map_in_order(make_part, tasks(), workers, begin, context):
            pass
    return parts


def _batches(sources: Sequence[Source], encoding: str) -> Iterator[list[Document]]:
    batch: list[Document] = []
    for source in sources:
        for document in read_documents(source, encoding):
            batch.append(document)
            if len(batch) == BATCH_DOCUMENTS:
                yield batch
                batch = []
    if batch:
        yield batch


def _bar(what: str, unit: str) -> Any:
    return tqdm(desc=what, unit=unit, unit_scale=True, file=sys.stderr, disable=None if os.isatty(2) else True)
