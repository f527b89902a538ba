"""Every answer of a run's benchmarks as one blob that a page unpacks and lets the reader search.

Called by ``report.py``. Reads the ``samples_<task>.jsonl`` and ``prompts_<task>.jsonl.gz`` that an evaluation wrote.
The items travel as compressed base64. That keeps fourteen thousand questions at a few megabytes, and no
text a model wrote can end the script it stands in, for the alphabet of base64 holds no markup. The page shows it all
as text, never as HTML. The part all prompts of a group share (description and shots) is stored once.
"""

import base64
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What one report carries at most, before compression, all tasks together. MMLU with its prompts is 12 MB.
MAX_CHARACTERS = 40_000_000
# A single text is cut in its middle beyond this; the samples file has the whole.
MAX_TEXT = 8_000
# Sharing a prefix this short would save less than it costs in pointers.
_MIN_SHARED = 64
# Shown as columns of their own; whatever else a row holds is listed under "scores".
_SHOWN = {"id", "group", "prediction", "target", "completion", "task_id", "sample"}

Task = dict[str, Any]


def pack_items(folder: str | Path, max_characters: int = MAX_CHARACTERS) -> str:
    """Return a run's items as gzip in base64, or an empty text where it has none.

    Args:
        folder: A run folder of ``evaluate``.
        max_characters: How much text to carry; tasks share it evenly, and a task over its share loses its last items.
    """
    tasks = read_items(folder, max_characters)
    if not tasks:
        return ""
    data = json.dumps(tasks, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii")


def read_items(folder: str | Path, max_characters: int = MAX_CHARACTERS) -> list[Task]:
    """Return what a run answered, by task, in the form the page reads.

    Args:
        folder: A run folder of ``evaluate``.
        max_characters: As for `pack_items`.

    Returns:
        For each task ``name``, ``total`` (items on disk), ``prefixes`` and ``items``: per item ``id``, ``group``,
        ``ok`` (1, 0, a share, or None where nothing is right or wrong), ``prefix`` (index, or -1), ``prompt``,
        ``choices``, ``answers`` (what each choice stands for, where that is not its position), ``prediction``,
        ``target``, ``scores``.
    """
    paths = [path for path in sorted(Path(folder).glob("samples_*.jsonl")) if not path.name.endswith(".partial.jsonl")]
    return [_read_task(path, max_characters // len(paths)) for path in paths]


def _read_task(path: Path, max_characters: int) -> Task:
    name = path.name.removeprefix("samples_").removesuffix(".jsonl")
    prompts = _read_prompts(path.with_name(f"prompts_{name}.jsonl.gz"))
    rows = list(_read_lines(path))
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(_group(row), []).append(prompts.get(row["id"], {}).get("prompt", ""))
    prefixes = {group: _shared_prefix(texts) for group, texts in groups.items()}
    order = list(prefixes)
    task = {"name": name, "total": len(rows), "prefixes": [_cut(prefixes[group]) for group in order], "items": []}
    budget = max_characters
    for row in rows:
        shown = prompts.get(row["id"], {})
        item = _make_item(row, shown, prefixes[_group(row)], order.index(_group(row)))
        budget -= sum(len(str(value)) for value in item.values())
        if budget < 0:
            break
        task["items"].append(item)
    return task


def _make_item(row: dict[str, Any], shown: dict[str, Any], prefix: str, number: int) -> dict[str, Any]:
    prompt = shown.get("prompt", "")
    has_prefix = bool(prefix) and prompt.startswith(prefix)
    sample = row.get("sample", 0)
    return {
        "id": row["id"] + (f" #{sample}" if sample else ""),
        "group": _group(row),
        "ok": _outcome(row),
        "prefix": number if has_prefix else -1,
        "prompt": _cut(prompt[len(prefix) :] if has_prefix else prompt),
        "choices": shown.get("choices"),
        "answers": shown.get("answers"),
        "prediction": _cut_value(row.get("prediction")),
        "target": _cut_value(row.get("target")),
        "scores": {key: _cut_value(value) for key, value in row.items() if key not in _SHOWN},
    }


def _outcome(row: dict[str, Any]) -> float | None:
    """How right an item is; None where the benchmark knows no right and wrong."""
    value = row.get("acc", row.get("passed"))
    return None if value is None else float(value)


def _group(row: dict[str, Any]) -> str:
    return str(row.get("group") or "")


def _shared_prefix(texts: list[str]) -> str:
    """What all texts begin with, up to the end of a line; nothing for a single one."""
    if len(texts) < 2:
        return ""
    first, last = min(texts), max(texts)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(map(len, texts)))
    shared = first[: first.rfind("\n", 0, length) + 1]
    return shared if len(shared) >= _MIN_SHARED else ""


def _cut(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    half = MAX_TEXT // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _cut_value(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(value)
    if isinstance(value, int | float | bool | None):
        return value
    return json.loads(json.dumps(value)) if len(json.dumps(value)) <= MAX_TEXT else _cut(json.dumps(value))


def _read_prompts(path: Path) -> dict[str, dict[str, Any]]:
    """Prompts by item; empty for a run of an earlier version, which kept none."""
    return {row["id"]: row for row in _read_lines(path)} if path.is_file() else {}


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)
