"""One document on its way from a source to a shard, and what a filter decides about it."""

import dataclasses
import hashlib
from typing import Any

DROPPED = "dropped"


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """A text with where it stands.

    Args:
        text: The text.
        source: The source's name.
        file: Its file, relative to the source; the Hub id for a data set of the Hub.
        line: The line that it begins on, from 1; in CSV the one that it ends on, in Parquet and `datasets` the row.
        unit: Names the document that must not be split; passages of one book share it.
        split: ``train`` or ``validation`` where the source says so.
    """

    text: str
    source: str
    file: str
    line: int
    unit: str
    split: str | None = None

    @property
    def id(self) -> str:
        """Unique name, readable, from which the place can be found again."""
        return f"{self.source}/{self.file}#{self.line}"


@dataclasses.dataclass(slots=True)
class Examined:
    """A document after the filters that look at it alone.

    Args:
        document: As it was read.
        text: As it is now.
        language: ISO 639-1 code; empty where it was not asked.
        dropped_by: The filter that dropped it; empty where none did.
        reason: Why.
        changes: By filter, what was changed how often.
        figures: What the quality filter measured.
    """

    document: Document
    text: str
    language: str = ""
    dropped_by: str = ""
    reason: str = ""
    changes: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    figures: dict[str, float] = dataclasses.field(default_factory=dict)

    def drop(self, filter_name: str, reason: str) -> None:
        """Note the filter that dropped it.

        Args:
            filter_name: The filter.
            reason: Why, with figures.
        """
        self.dropped_by, self.reason = filter_name, reason

    def change(self, filter_name: str, counts: dict[str, int]) -> None:
        """Note what a filter changed.

        Args:
            filter_name: The filter.
            counts: How often, by kind; zeros are left out.
        """
        kept = {kind: count for kind, count in counts.items() if count}
        if kept:
            self.changes[filter_name] = kept


def hash_text(text: str) -> str:
    """Return the first 16 hexadecimal digits of a text's SHA-256.

    Args:
        text: The text.
    """
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def row_of(examined: Examined, split: str) -> dict[str, Any]:
    """Return the row that a shard holds.

    Args:
        examined: A document that no filter dropped.
        split: ``train`` or ``validation``.
    """
    document = examined.document
    return {
        "text": examined.text,
        "id": document.id,
        "source": document.source,
        "file": document.file,
        "line": document.line,
        "origin_sha256": hash_text(document.text),
        "language": examined.language,
        "split": split,
    }
