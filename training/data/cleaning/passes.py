"""The passes over the sources: a look at every file, a fit, the filters, and the result."""

import collections
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from deepseek_records.hashes import hash_rows
from deepseek_records.run_folder import write_json, write_text
from deepseek_records.summary import DataUse, Summary
from deepseek_training.data.cleaning.contamination import ContaminationIndex
from deepseek_training.data.cleaning.data_card import count_terms, write_card
from deepseek_training.data.cleaning.decisions import Counts, Decisions
from deepseek_training.data.cleaning.documents import Document
from deepseek_training.data.cleaning.examine import Context, examine
from deepseek_training.data.cleaning.fit import fit_context, sample_documents
from deepseek_training.data.cleaning.parts import BATCH_DOCUMENTS, begin, make_part, read_parts
from deepseek_training.data.cleaning.shards import ShardWriter
from deepseek_training.data.cleaning.sources import Source, read_documents, survey
from deepseek_training.data.cleaning.workers import map_in_order
from deepseek_training.recipes.data import DataRecipe, SourceSettings

DATA_FOLDER, DROPPED_FOLDER, WORK_FOLDER = "data", "dropped", "work"
_TRIED_DOCUMENTS = 64


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
    sources: Sequence[Source], trusted: Source | None, benchmarks: Mapping[str, Sequence[tuple[str, str]]]
) -> dict[str, str]:
    """Return hashes of what the result is made of, for `RunFolder.hold_to`.

    Args:
        sources: The sources.
        trusted: The trusted text.
        benchmarks: The benchmarks' items.
    """
    hashes = {f"source {source.settings.name}": source.sha256 for source in sources}
    if trusted is not None:
        hashes["trusted"] = trusted.sha256
    hashes["benchmarks"] = hash_rows([[task, list(map(list, items))] for task, items in sorted(benchmarks.items())])
    return hashes


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


def write_result(
    output: Path, parts: list[Path], decisions: Decisions, context: Context, sources: Sequence[Source]
) -> Summary:
    """Write shards, samples, counts and limits, and return the summary without its time.

    Args:
        output: The run folder.
        parts: Of the first pass.
        decisions: What becomes of each document.
        context: What was fitted.
        sources: The sources.

    Raises:
        ValueError: No document is left to train on.
    """
    recipe, counts = context.recipe, Counts(context.recipe)
    if "train" not in decisions.splits:
        drops = collections.Counter(filter(None, decisions.dropped_by)).most_common()
        told = ", ".join(f"{name} {count}" for name, count in drops) or "all are held out"
        raise ValueError(
            f"filters: no document is left to train on (dropped: {told}); loosen the filter that drops most"
        )
    folder = output / DATA_FOLDER
    _empty(folder)
    splits = ("train", "validation")
    writers = {name: ShardWriter(folder, name, recipe.format, recipe.shard_megabytes * 1e6) for name in splits}
    people: collections.Counter[str] = collections.Counter()
    uses: collections.Counter[tuple[str, str, str]] = collections.Counter()
    number = 0
    for rows in read_parts(parts):
        for row in rows:
            split, dropped_by = decisions.splits[number], decisions.dropped_by[number]
            counts.add(row, dropped_by, decisions.reasons.get(number, row["reason"]))
            if split:
                writers[split].add(_output_row(row, split))
                people.update(count_terms(row["text"]))
                uses[row["source"], split, "rows"] += 1
                uses[row["source"], split, "bytes"] += len(row["text"].encode())
            number += 1
    files = [path for writer in writers.values() for path in writer.close()]
    _write_samples(output / DROPPED_FOLDER, counts)
    details = {**_details(counts, context, sources, files, output), "people": dict(people.most_common())}
    write_json(output / "counts.json", details)
    summary = Summary(stage="data", data=_data_uses(uses, sources, counts), details=details)
    write_card(output, summary, counts.samples)
    return summary


def _output_row(row: dict[str, Any], split: str) -> dict[str, Any]:
    return {
        "text": row["text"],
        "id": f"{row['source']}/{row['file']}#{row['line']}",
        **{name: row[name] for name in ("source", "file", "line", "origin_sha256", "language")},
        "split": split,
    }


def _details(
    counts: Counts, context: Context, sources: Sequence[Source], files: Sequence[Path], output: Path
) -> dict[str, Any]:
    return {
        "read": dict(counts.read),
        "kept": dict(counts.kept),
        "languages": dict(counts.languages.most_common()),
        "filters": [count.to_json() for count in counts.filters.values()],
        "limits": {
            "/".join(filter(None, key)): {
                "documents": model.num_documents,
                **{name: round(value, 4) for name, value in model.limits.items() if abs(value) < float("inf")},
            }
            for key, model in sorted(context.quality.items())
        },
        "benchmark_items_too_short": dict(sorted(context.contamination.num_short.items())),
        "files": {str(path.relative_to(output)): _sha256(path) for path in files},
        "inputs": {str(source.settings.name): {file.name: file.sha256 for file in source.files} for source in sources},
    }


def _data_uses(
    uses: Mapping[tuple[str, str, str], int], sources: Sequence[Source], counts: Counts
) -> tuple[DataUse, ...]:
    found = []
    for source in sources:
        for split in ("train", "validation"):
            name = str(source.settings.name)
            if uses.get((name, split, "rows"), 0):
                found.append(
                    DataUse(
                        name=name,
                        split=split,
                        used_for="training" if split == "train" else "evaluation",
                        license=source.settings.license,
                        source=source.settings.url,
                        num_rows=uses[name, split, "rows"],
                        num_bytes=uses[name, split, "bytes"],
                        hub_id=None if source.files or Path(source.settings.path).exists() else source.settings.path,
                        languages=tuple(counts.languages_of(name)),
                    )
                )
    return tuple(found)


def _write_samples(folder: Path, counts: Counts) -> None:
    _empty(folder)
    for name, rows in counts.samples.items():
        if rows:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / f"{name.replace(' ', '_')}.jsonl", lines)


def _empty(folder: Path) -> None:
    """Make a folder of ours, without what a killed run left in it."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()


def _sha256(path: Path) -> str:
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _bar(what: str, unit: str) -> Any:
    return tqdm(desc=what, unit=unit, unit_scale=True, file=sys.stderr, disable=None if os.isatty(2) else True)


def cache_tokens(folder: Path, tokenizer: str) -> None:
    """Tokenize both splits into the cache that training reads.

    Args:
        folder: The shards.
        tokenizer: Folder or Hub id.
    """
    from deepseek_records.loading import load_tokenizer
    from deepseek_training.data.packing import encode_documents
    from deepseek_training.data.texts import load_texts

    loaded = load_tokenizer(tokenizer)
    for split in ("train", "validation"):
        if any(folder.glob(f"{split}-*")):
            encode_documents(load_texts(folder, split), loaded)
