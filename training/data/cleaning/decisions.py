"""What needs all documents at once: duplicates over all sources, the split, and the counts of every filter."""

import collections
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_training.data.cleaning.duplicates import NUM_PERMUTATIONS, find_duplicates
from deepseek_training.data.cleaning.examine import EMPTY
from deepseek_training.data.cleaning.parts import read_parts
from deepseek_training.recipes.data import DataRecipe

EXACT, NEAR = "exact duplicates", "near-duplicates"


@dataclasses.dataclass
class FilterCount:
    """What one filter did.

    Args:
        name: The filter.
        num_in: Documents that reached it.
        num_dropped: Of these dropped.
        num_changed: Of these changed and kept.
        changes: By kind, how often something was changed.
        dropped: By source and language, documents dropped.
        reached: By source and language, documents that reached it.
    """

    name: str
    num_in: int = 0
    num_dropped: int = 0
    num_changed: int = 0
    changes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    dropped: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    reached: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def to_json(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: dict(sorted(one.items())) if isinstance(one, dict) else one for name, one in values.items()}


@dataclasses.dataclass
class Decisions:
    """Which documents stay, and in which split.

    Args:
        splits: Of each document in order ``train`` or ``validation``, or "" for one that was dropped.
        dropped_by: Of each document the filter; "" for one that stays.
        reasons: Why, of those that only a comparison dropped.
    """

    splits: list[str]
    dropped_by: list[str]
    reasons: dict[int, str]


def decide(parts: list[Path], recipe: DataRecipe) -> Decisions:
    """Return what becomes of each document.

    Args:
        parts: All parts, in order.
        recipe: The settings.
    """
    columns = ["source", "file", "line", "unit", "split", "dropped_by", "exact", "signature"]
    dropped_by: list[str] = []
    splits: list[str] = []
    places: list[str] = []
    exact: list[int] = []
    kept: list[int] = []
    signatures: list[np.ndarray] = []
    for rows in read_parts(parts, columns):
        for row in rows:
            dropped_by.append(row["dropped_by"])
            splits.append(row["split"] or _split_of(row["unit"], recipe.validation_share))
            if not row["dropped_by"]:
                kept.append(len(dropped_by) - 1)
                exact.append(row["exact"])
                places.append(f"{row['source']}/{row['file']}#{row['line']}")
                signatures.append(np.frombuffer(row["signature"], np.uint32))
    reasons: dict[int, str] = {}
    if "duplicates" in recipe.filters and kept:
        stacked = np.stack(signatures) if signatures else np.zeros((0, NUM_PERMUTATIONS), np.uint32)
        priority = np.array([splits[i] != "validation" for i in kept], np.int8)
        stays, is_exact = find_duplicates(stacked, np.array(exact, np.uint64), priority, recipe.near_duplicates)
        for place, keeper in enumerate(stays.tolist()):
            if keeper != place:
                held_out = " (held out)" if splits[kept[keeper]] == "validation" else ""
                dropped_by[kept[place]] = EXACT if is_exact[place] else NEAR
                reasons[kept[place]] = f"of {places[keeper]}{held_out}"
    splits = ["" if drop else split for drop, split in zip(dropped_by, splits, strict=True)]
    return Decisions(splits, dropped_by, reasons)


def _split_of(unit: str, validation_share: float) -> str:
    return "validation" if int(unit[:8], 16) < validation_share * 2**32 else "train"


def names_of_filters(recipe: DataRecipe) -> list[str]:
    """Return the names that counts go by, in the order of the filters.

    Args:
        recipe: The settings.
    """
    names = [name for name in recipe.filters if name != "duplicates"]
    names.insert(names.index("repair") + 1 if "repair" in names else 0, EMPTY)
    return [*names, *((EXACT, NEAR) if "duplicates" in recipe.filters else ())]


class Counts:
    """Counts of every filter and samples of what it did, gathered row by row.

    Args:
        recipe: The settings.
    """

    def __init__(self, recipe: DataRecipe) -> None:
        self.filters = {name: FilterCount(name) for name in names_of_filters(recipe)}
        self.samples: dict[str, list[dict[str, Any]]] = {name: [] for name in self.filters}
        self.kept: collections.Counter[str] = collections.Counter()
        self.read: collections.Counter[str] = collections.Counter()
        self.languages: collections.Counter[str] = collections.Counter()
        self._by_source: collections.Counter[tuple[str, str]] = collections.Counter()
        self._num_samples = recipe.num_samples
        self._shown: collections.Counter[tuple[str, str]] = collections.Counter()

    def add(self, row: dict[str, Any], dropped_by: str, reason: str) -> None:
        """Count one document.

        Args:
            row: Of a part.
            dropped_by: The filter that dropped it, "" where none did.
            reason: Why.
        """
        changes = json.loads(row["changes"]) if row["changes"] else {}
        group = f"{row['source']}/{row['language'] or 'none'}"
        self.read[row["source"]] += 1
        for name, count in self.filters.items():
            count.num_in += 1
            count.reached[group] += 1
            for kind, number in changes.get(name, {}).items():
                count.changes[kind] += number
                self._show(row, name, kind, f"{kind}: {number}")
            count.num_changed += name in changes
            if name == dropped_by:
                count.num_dropped += 1
                count.dropped[group] += 1
                self._show(row, name, f"dropped {reason.split(':')[0] if name == 'quality' else ''}", reason)
                return
        self.kept[row["source"]] += 1
        self.languages[row["language"] or "none"] += 1
        self._by_source[row["source"], row["language"]] += 1

    def languages_of(self, source: str) -> list[str]:
        """Return the languages of a source's kept documents, the most frequent first, without rare ones.

        Args:
            source: Its name.
        """
        found = [
            (count, language) for (name, language), count in self._by_source.items() if name == source and language
        ]
        return [language for count, language in sorted(found, reverse=True) if count >= 0.05 * self.kept[source]]

    def _show(self, row: dict[str, Any], name: str, kind: str, reason: str) -> None:
        if self._shown[name, kind] < self._num_samples:
            self._shown[name, kind] += 1
            place = {"source": row["source"], "file": row["file"], "line": row["line"]}
            self.samples[name].append({**place, "why": reason, "text": row["excerpt"]})
