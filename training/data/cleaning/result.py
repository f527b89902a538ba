"""What a cleaning leaves: shards, samples of what was dropped, counts, limits, the card and cached tokens.

The folder of the shards gets its name when all of them are whole, so that nobody trains on a part of them.
"""

import collections
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_records.run_folder import write_json, write_text
from deepseek_records.summary import DataUse, Summary
from deepseek_training.data.cleaning.data_card import count_terms, write_card
from deepseek_training.data.cleaning.decisions import Counts, Decisions
from deepseek_training.data.cleaning.examine import Context
from deepseek_training.data.cleaning.parts import read_parts
from deepseek_training.data.cleaning.shards import ShardWriter
from deepseek_training.data.cleaning.sources import Source

DATA_FOLDER, DROPPED_FOLDER, WORK_FOLDER = "data", "dropped", "work"
_SPLITS = ("train", "validation")


def write_result(
    output: Path,
    parts: list[Path],
    decisions: Decisions,
    context: Context,
    sources: Sequence[Source],
    tokenizer: Any = None,
) -> Summary:
    """Write shards, samples, counts and limits, and return the summary without its time.

    Args:
        output: The run folder.
        parts: Of the first pass.
        decisions: What becomes of each document.
        context: What was fitted.
        sources: The sources.
        tokenizer: Whose tokens are counted and cached; None: none are.

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
    folder = output / WORK_FOLDER / "shards"
    _empty(folder)
    writers = {name: ShardWriter(folder, name, recipe.format, recipe.shard_megabytes * 1e6) for name in _SPLITS}
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
    named = [path.name for writer in writers.values() for path in writer.close()]
    tokens = {"tokens": cache_tokens(folder, tokenizer)} if tokenizer is not None else {}
    _give_name(folder, output / DATA_FOLDER)
    files = [output / DATA_FOLDER / name for name in named]
    _write_samples(output / DROPPED_FOLDER, counts)
    details = {**_details(counts, context, sources, files, output), "people": dict(people.most_common()), **tokens}
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
        for split in _SPLITS:
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


def _give_name(folder: Path, name: Path) -> None:
    """Move a whole folder to its place, where an earlier start of the same run may have left one."""
    if name.exists():
        _empty(name)
        name.rmdir()
    os.rename(folder, name)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cache_tokens(folder: Path, tokenizer: Any) -> dict[str, int]:
    """Tokenize both splits into the cache that training reads, and return the tokens of each.

    Args:
        folder: The shards.
        tokenizer: A `transformers` tokenizer.
    """
    from deepseek_training.data.packing import encode_documents
    from deepseek_training.data.texts import load_texts

    return {
        split: sum(map(len, encode_documents(load_texts(folder, split), tokenizer)))
        for split in _SPLITS
        if any(folder.glob(f"{split}-*"))
    }
