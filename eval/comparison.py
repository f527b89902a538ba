"""Compares two runs on the items both answered: paired, so that the items' difficulty cancels.

    compare_runs("runs/before", "runs/after")["mmlu"]
    deepseek-moe evaluate --compare runs/before runs/after

Two runs whose error bars overlap may still differ for certain, because both saw the same questions; the paired test
looks only at the items where they disagree. What it does not show: whether the difference matters to anyone.

Reference: McNemar, 1947, "Note on the sampling error of the difference between correlated proportions",
Psychometrika 12.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_records.run_folder import RunFolder
from deepseek_records.statistics import mean_with_error, ratio_with_error

_PREFIX, _SUFFIX = "samples_", ".jsonl"


def compare_runs(first: str | Path, second: str | Path) -> dict[str, dict[str, Any]]:
    """Return, by task, the difference second minus first with its standard error and an exact p-value.

    Args:
        first: A run folder of `evaluate_model`.
        second: Another one.

    Raises:
        FileNotFoundError: A folder holds no samples.
        ValueError: The two share no task whose items are right or wrong or texts, or no item of one, or asked other
            questions under the same ids.
    """
    ours, theirs = _read_run(Path(first)), _read_run(Path(second))
    shared = [task for task in ours if task in theirs]
    if not shared:
        raise ValueError(f"runs: {first} ({', '.join(ours)}) and {second} ({', '.join(theirs)}) share no task")
    for task in shared:
        _check_questions(task, ours[task].hashes, theirs[task].hashes)
    return {task: _compare_task(task, ours[task], theirs[task]) for task in shared}


def _compare_task(task: str, first: "_Answers", second: "_Answers") -> dict[str, Any]:
    if first.num_bytes:
        return compare_texts(task, first.scores, second.scores, first.num_bytes)
    return compare_hits(task, first.scores, second.scores)


def compare_hits(task: str, first: dict[str, float], second: dict[str, float]) -> dict[str, Any]:
    """Compare two sets of scores by item.

    Args:
        task: Named in errors.
        first: Score by item, 0 or 1, or a share over several samples.
        second: The same of the other run.

    Returns:
        ``first`` and ``second`` (the means), ``difference`` over the shared items with its ``stderr``, ``n``,
        ``num_better``, ``num_worse``, and ``p_value`` of the exact two-sided sign test over the items that differ.
    """
    names = [name for name in first if name in second]
    if not names:
        raise ValueError(f"runs: the two share no item of {task}")
    differences = [second[name] - first[name] for name in names]
    n = len(differences)
    mean, stderr = mean_with_error(differences)
    better, worse = sum(value > 0 for value in differences), sum(value < 0 for value in differences)
    return {
        "first": sum(first[name] for name in names) / n,
        "second": sum(second[name] for name in names) / n,
        "difference": mean,
        "stderr": stderr,
        "n": n,
        "num_better": better,
        "num_worse": worse,
        "p_value": _sign_test(better, worse),
    }


def compare_texts(
    task: str, first: dict[str, float], second: dict[str, float], num_bytes: dict[str, int]
) -> dict[str, Any]:
    """Compare two models' bits on the same documents.

    Args:
        task: Named in errors.
        first: Bits by document.
        second: The same of the other run.
        num_bytes: Bytes by document.

    Returns:
        As `compare_hits`, in bits per byte; a document is better where it takes fewer bits.
    """
    names = [name for name in first if name in second]
    if not names:
        raise ValueError(f"runs: the two share no item of {task}")
    sizes = [float(num_bytes[name]) for name in names]
    differences = [second[name] - first[name] for name in names]
    mean, stderr = ratio_with_error(differences, sizes)
    better, worse = sum(value < 0 for value in differences), sum(value > 0 for value in differences)
    return {
        "first": sum(first[name] for name in names) / sum(sizes),
        "second": sum(second[name] for name in names) / sum(sizes),
        "difference": mean,
        "stderr": stderr,
        "n": len(names),
        "num_better": better,
        "num_worse": worse,
        "p_value": _sign_test(better, worse),
        "is_lower_better": True,
    }


def differing_settings(first: str | Path, second: str | Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings that two runs do not share, by name; all but the model are reasons for doubt.

    Args:
        first: A run folder.
        second: Another one.
    """
    ours, theirs = (RunFolder(folder).settings for folder in (first, second))
    names = [*ours, *(name for name in theirs if name not in ours)]
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def format_comparison(first: str | Path, second: str | Path) -> str:
    """Return the paired comparison of two runs as a small table, with what else differs between them.

    Args:
        first: A run folder of ``evaluate``.
        second: Another one.
    """
    widths = "{:<18}{:>9}{:>9}{:>12}{:>9}{:>7}{:>8}{:>7}{:>10}"
    names = ("task", "first", "second", "difference", "stderr", "n", "better", "worse", "p")
    lines = [f"first   {first}", f"second  {second}", "", widths.format(*names)]
    compared = compare_runs(first, second)
    for task, row in compared.items():
        stderr = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        scores = (f"{row['first']:.4f}", f"{row['second']:.4f}", f"{row['difference']:+.4f}", stderr)
        counts = (row["n"], row["num_better"], row["num_worse"])
        lines.append(widths.format(task, *scores, *counts, f"{row['p_value']:.2g}"))
    falling = [task for task, row in compared.items() if row.get("is_lower_better")]
    if falling:
        lines += ["", f"Bits per byte, lower is better: {', '.join(falling)}."]
    changed = [
        f"{name} ({a} | {b})"
        for name, (a, b) in differing_settings(first, second).items()
        if name not in ("model_name_or_path", "samples")
    ]
    if changed:
        lines += ["", f"The runs also differ in {', '.join(changed)}."]
    return "\n".join(lines)


def _sign_test(better: int, worse: int) -> float:
    """Probability of a split at least this uneven if either way were a coin's toss."""
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    # Integers until the last step: the powers overflow floats beyond a thousand items.
    return min(1.0, 2 * tail / 2**total) if total else 1.0


def _check_questions(task: str, first: dict[str, str], second: dict[str, str]) -> None:
    """Refuse two runs that asked different questions under one id."""
    shared = [name for name in first if name in second]
    other = [name for name in shared if first[name] != second[name]]
    if other:
        raise ValueError(
            f"runs: {task}: got other questions under {len(other)} of {len(shared)} shared ids (the first is "
            f"{other[0]}), expected two runs on the same questions"
        )


def _parse_sample(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: got no JSON ({error}), expected a sample") from None
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise ValueError(f"{where}: id: got no text, expected the question's id")
    return row


@dataclass(frozen=True)
class _Answers:
    """By item: mean score, or the bits of a text; the question's hash (none in earlier versions' runs); its bytes."""

    scores: dict[str, float]
    hashes: dict[str, str]
    num_bytes: dict[str, int]


def sample_files(folder: Path) -> dict[str, Path]:
    """Return the finished answers of a run, by task.

    Args:
        folder: The run folder.
    """
    paths = [path for path in sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}")) if not path.stem.endswith(".partial")]
    return {path.name[len(_PREFIX) : -len(_SUFFIX)]: path for path in paths}


def _read_run(folder: Path) -> dict[str, _Answers]:
    """What a run answered, by task; tasks that know no right and wrong are left out."""
    tasks = {}
    for task, path in sample_files(folder).items():
        scores: dict[str, list[float]] = {}
        seen: dict[str, str] = {}
        sizes: dict[str, int] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            row = _parse_sample(line, f"run: {path}, line {number}")
            score = row.get("acc", row.get("passed"))
            if "loglikelihood" in row and "num_bytes" in row:
                score = -row["loglikelihood"] / math.log(2)
                sizes[row["id"]] = row["num_bytes"]
            if score is not None:  # Some benchmarks have no right and wrong.
                scores.setdefault(row["id"], []).append(float(score))
                if "question_hash" in row:
                    seen[row["id"]] = row["question_hash"]
        if scores:
            means = {name: sum(values) / len(values) for name, values in scores.items()}
            tasks[task] = _Answers(means, seen, sizes)
    if not tasks:
        raise FileNotFoundError(f"run: {folder} holds no samples_<task>.jsonl, expected a run folder of evaluate")
    return tasks
