"""What is said before the data are cleaned: sources, filters, benchmarks, and in a dry run the time it takes."""

import time
from collections.abc import Sequence
from pathlib import Path

from deepseek_training.data.cleaning.contamination import ContaminationIndex
from deepseek_training.data.cleaning.documents import Document
from deepseek_training.data.cleaning.examine import Context, examine
from deepseek_training.data.cleaning.sources import Source, read_documents
from deepseek_training.recipes.data import DataRecipe

_TRIED_DOCUMENTS = 64


def announce_sources(
    recipe: DataRecipe,
    sources: Sequence[Source],
    index: ContaminationIndex,
    output: Path,
    *,
    is_dry: bool,
    workers: int,
) -> None:
    """Print what is about to be done; in a dry run also how long it takes, measured on the first documents.

    Args:
        recipe: The settings.
        sources: The sources.
        index: The benchmarks.
        output: The run folder.
        is_dry: Whether it is only said.
        workers: Processes.
    """
    print(f"data: {output}")
    for source in sources:
        num_bytes = sum(file.num_bytes for file in source.files)
        size = f"{len(source.files)} files, {num_bytes / 1e6:.1f} MB" if source.files else "streamed"
        print(f"  {source.settings.name:<13}{size}, license: {source.settings.license}")
    print(f"  {'filters':<13}{', '.join(recipe.filters)}")
    if "contamination" in recipe.filters:
        short = sum(index.num_short.values())
        print(f"  {'benchmarks':<13}{len(index.names):,} items searched for, {short:,} too short to be")
    if is_dry:
        print(f"  {'time':<13}{_estimate(recipe, sources, index, workers)}")


def _estimate(recipe: DataRecipe, sources: Sequence[Source], index: ContaminationIndex, workers: int) -> str:
    tried: list[Document] = []
    for source in sources:
        for number, document in enumerate(read_documents(source, recipe.encoding)):
            if number >= _TRIED_DOCUMENTS // len(sources):
                break
            tried.append(document)
    context = Context(recipe, contamination=index)
    for document in tried[:4]:  # What the filters load does not belong to the rate.
        examine(document, context)
    began = time.perf_counter()
    for document in tried:
        examine(document, context)
    size = sum(len(document.text.encode()) for document in tried)
    rate = max(1, size) / (time.perf_counter() - began)
    if any(not source.files for source in sources):
        return f"{rate / 1e6:.2f} MB/s per process, measured on {len(tried)} documents; streamed text has no size"
    num_bytes = sum(file.num_bytes for source in sources for file in source.files)
    return (
        f"at least {num_bytes / rate / workers:,.0f} s at {rate / 1e6:.2f} MB/s per process, measured on {len(tried)} "
        "documents; compressed files take longer than their size tells"
    )
