"""What of the documents is missing, required and optional, by article: for a terminal and for machines."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deepseek_model_cards.eu.documents import NOTICE, Documents, model_title
from deepseek_model_cards.eu.entries import Status


def describe_missing(documents: Documents) -> dict[str, Any]:
    """Return what is missing by article, required and optional, and what contradicts, for machines.

    Args:
        documents: What `read_documents` gave.
    """
    rows: dict[str, dict[str, Any]] = {}
    for document, entry in documents.entries:
        if entry.status in (Status.OPEN, Status.PART, Status.DEPENDS):
            field = entry.field
            row = rows.setdefault(
                field.key,
                {
                    "key": field.key,
                    "title": field.title,
                    "documents": [],
                    "article": field.article,
                    "law": list(field.law),
                    "required": entry.is_missing,
                    "status": str(entry.status),
                    "wants": entry.wants,
                },
            )
            row["documents"].append(document.name)
            row["required"] = row["required"] or entry.is_missing
    return {
        "model": model_title(documents),
        "notice": NOTICE,
        "complete": not any(row["required"] for row in rows.values()),
        "missing": list(rows.values()),
        "contradictions": documents.contradictions,
        "notes": documents.notes,
    }


def format_missing(missing: Mapping[str, Any]) -> str:
    """Return the list for a terminal, by article.

    Args:
        missing: What `describe_missing` gave.
    """
    rows: Sequence[Mapping[str, Any]] = missing["missing"]
    lines: list[str] = []
    for article in dict.fromkeys(row["article"] for row in rows):
        lines += [f"{article}:", *_article_lines(row for row in rows if row["article"] == article)]
    lines += [f"contradicts: {key}: {why}" for key, why in missing["contradictions"].items()]
    lines += [f"note: {note}" for note in missing["notes"]]
    required = sum(bool(row["required"]) for row in rows)
    lines.append(f"{required} required fields are missing, {len(rows) - required} others are open")
    lines.append(missing["notice"])
    return "\n".join(lines)


def _article_lines(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = []
    for row in sorted(rows, key=lambda row: not row["required"]):
        word = "required" if row["required"] else "optional" if row["status"] != Status.DEPENDS else "depends"
        lines.append(f"  {word}  {row['key']}: {row['title']} ({row['status']}); {' '.join(row['wants'].split())}")
    return lines
