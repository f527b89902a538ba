"""One check of a folder of requests, as a scheduler starts it once a day: `deepseek-moe monitor drift`."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_serving.monitoring.drift import DriftCheck, Finding
from deepseek_serving.monitoring.drift_reference import load_reference
from deepseek_serving.monitoring.drift_report import HISTORY, REPORT, read_history
from deepseek_serving.monitoring.request_counts import RequestTable, bin_of, load_requests

# Fewer say nothing about any distribution.
_MIN_REQUESTS = 20
# Bins of continuous distributions: the reference's deciles, and answers that the limit cut.
_TENTHS = ("lowest tenth", *(f"tenth {number}" for number in range(2, 10)), "highest tenth", "cut by the limit")


def measure_drift(
    folder: Path, reference_path: Path, *, hours: float, until: float | None = None, decode: Callable[[int], str] = str
) -> dict[str, Any]:
    """Check the requests of the last hours, and write what was found beside them.

    Args:
        folder: Where the server keeps them.
        reference_path: The reference's file.
        hours: Length of the window.
        until: Its end as Unix time; None is now.
        decode: A token's text.

    Returns:
        The report: `rows`, one per distribution, and counts of requests.

    Raises:
        FileNotFoundError: The reference or the folder is not there.
        ValueError: The requests are of another model than the reference.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"requests: {folder} is not there; deepseek-moe serve MODEL --requests DIR fills it")
    until = time.time() if until is None else until
    reference = load_reference(reference_path)
    window = load_requests(folder, until - hours * 3600, until)
    report: dict[str, Any] = {
        "checked_at": until,
        "hours": hours,
        "num_requests": 0 if window is None else len(window),
        "num_used": 0,
        "rows": [],
    }
    if window is not None:
        reference = load_reference(reference_path, window.model_hash)
        if len(window) >= _MIN_REQUESTS:
            used = _thin(window, len(reference) // 2)
            report["num_used"] = len(used)
            findings = DriftCheck(reference, len(used)).check(used)
            before = _significant_before(folder, report)
            report["rows"] = [_describe(found, before, used, reference, decode) for found in findings]
    _write(folder, report)
    return report


def _thin(window: RequestTable, most: int) -> RequestTable:
    """A window of at most half of the reference: the null is drawn from as many of its requests."""
    if len(window) <= most:
        return window
    return window.take(np.random.default_rng(0).permutation(len(window))[:most])


def _significant_before(folder: Path, report: dict[str, Any]) -> set[tuple[str, str]]:
    """Distributions that were significant in the check before, if that was about one window ago."""
    seconds = report["hours"] * 3600
    past = [old for old in read_history(folder) if 0.5 * seconds <= report["checked_at"] - old["checked_at"]]
    if not past or report["checked_at"] - past[-1]["checked_at"] > 1.5 * seconds:
        return set()
    return {(row["distribution"], row["layer"]) for row in past[-1]["rows"] if row["is_significant"]}


def _describe(
    found: Finding,
    before: set[tuple[str, str]],
    window: RequestTable,
    reference: RequestTable,
    decode: Callable[[int], str],
) -> dict[str, Any]:
    row = asdict(found)
    row["is_alarm"] = found.is_alarm
    row["is_significant"] = found.is_significant
    row["is_warning"] = found.is_significant and (found.distribution, found.layer) in before
    places = [place for place, _, _ in found.moved]
    if found.distribution == "experts":
        names = [str(place) for place in places]
    elif found.distribution == "tokens":
        names = [_name_token(place, window, reference, decode) for place in places]
    else:
        names = [_TENTHS[place] for place in places]
    row["moved"] = [
        {"name": name, "before": before_share, "now": share}
        for name, (_, before_share, share) in zip(names, found.moved, strict=True)
    ]
    return row


def _name_token(place: int, window: RequestTable, reference: RequestTable, decode: Callable[[int], str]) -> str:
    """The token of a bin whose share moved most."""
    shares: dict[int, float] = {}
    for sign, table in ((1, window), (-1, reference)):
        in_bin = bin_of(table.token_ids) == place
        total = table.token_counts.sum()
        for number, count in zip(table.token_ids[in_bin].tolist(), table.token_counts[in_bin].tolist(), strict=True):
            shares[number] = shares.get(number, 0.0) + sign * count / total
    most = max(shares, key=lambda number: abs(shares[number]), default=None)
    return "" if most is None else decode(most)


def _write(folder: Path, report: dict[str, Any]) -> None:
    unfinished = folder / f"{REPORT}.part"
    unfinished.write_text(json.dumps(report, indent=1), encoding="utf-8")
    os.replace(unfinished, folder / REPORT)
    with open(folder / HISTORY, "a", encoding="utf-8") as file:
        file.write(json.dumps(report) + "\n")


def format_report(report: dict[str, Any]) -> str:
    """Return a table of what was found, with what moved most below each alarm and warning.

    Args:
        report: From `measure_drift`.
    """
    lines = [f"{report['num_requests']} requests in {report['hours']:g} hours, {report['num_used']} of them compared"]
    if not report["rows"]:
        return lines[0] + f"\ntoo little traffic: at least {_MIN_REQUESTS} requests are needed"
    layout = "{:<34}{:>8}{:>11}{:>11}{:>10}  {}"
    lines.append(layout.format("distribution", "KL", "corrected", "null 99.9%", "p (Holm)", "says"))
    for row in report["rows"]:
        name = f"{row['distribution']} {row['layer']}".strip()
        corrected = "-" if row["corrected"] is None else f"{row['corrected']:.4f}"
        numbers = f"{row['raw']:.4f}", corrected, f"{row['null_high']:.4f}", f"{row['p_holm']:.1g}"
        lines.append(layout.format(name, *numbers, _say(row)))
        if row["is_alarm"] or row["is_significant"]:
            moved = ", ".join(f"{one['name']!r} {one['before']:.1%} to {one['now']:.1%}" for one in row["moved"][:3])
            lines.append(f"    moved most: {moved}")
    return "\n".join(lines)


def _say(row: dict[str, Any]) -> str:
    if row["is_alarm"]:
        return "ALARM: above 0.15"
    if row["is_warning"]:
        return "warning: significant twice in a row"
    if row["is_significant"]:
        return "significant; a warning if it is so again"
    return "too little traffic" if row["corrected"] is None else "as before"
