"""The fields of each document: what it asks, by which article, and what can fill it. Read from ``fields.yaml``.

A question that two documents ask has one key, so that it is answered once.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from deepseek_records.typed_json import from_json

Kind = Literal["text", "date", "yes_no", "categories"]
FIELDS_FILE = Path(__file__).parent / "fields.yaml"
DOCUMENTS = ("technical", "summary")
HIGH_RISK = "high_risk"


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a document.

    Args:
        key: Its name in the provider's answers.
        title: Its heading.
        law: The articles, points and items that ask for it.
        asks: What it asks, in our words.
        kind: What an answer is.
        required: False where the law or its form says that it is optional, or asks for it only where it applies.
        finder: What fills it from files, a name of `deepseek_model_cards.eu.finders.FINDERS`; None: only the provider.
        more: What files can never tell of it, where they tell a part.
        when: The keys, joined by ``or``, one of which must be answered with yes for the field to apply.
    """

    key: str
    title: str
    law: tuple[str, ...]
    asks: str
    kind: Kind = "text"
    required: bool = True
    finder: str | None = None
    more: str = ""
    when: str | None = None

    @property
    def conditions(self) -> tuple[str, ...]:
        """The keys of the questions of which one must be answered with yes; none for a field that always applies."""
        return tuple(self.when.split(" or ")) if self.when else ()

    @property
    def article(self) -> str:
        """The first of the articles and annexes that ask for it, without its points."""
        words = self.law[0].split()
        return " ".join(words[:2]).rstrip(",")


@dataclass(frozen=True, kw_only=True)
class Section:
    """Fields under one heading.

    Args:
        title: The heading.
        fields: Its fields.
    """

    title: str
    fields: tuple[Field, ...]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One document's fields.

    Args:
        title: Its heading.
        law: What asks for the document.
        file: The name of its files, without an ending.
        sections: Its fields by section.
    """

    title: str
    law: str
    file: str
    sections: tuple[Section, ...]

    @property
    def fields(self) -> tuple[Field, ...]:
        """Every field, in order."""
        return tuple(field for section in self.sections for field in section.fields)


@functools.cache
def read_forms() -> dict[str, Form]:
    """Return every document's form by its name: ``technical``, ``summary`` and ``high_risk``."""
    value = yaml.safe_load(FIELDS_FILE.read_text(encoding="utf-8"))
    return {name: from_json(Form, form, f"{FIELDS_FILE.name}: {name}") for name, form in value.items()}


def fields_of(names: Iterable[str]) -> dict[str, Field]:
    """Return the fields of several documents by key; of a question asked twice the first.

    Args:
        names: The documents.
    """
    found: dict[str, Field] = {}
    for name in names:
        for field in read_forms()[name].fields:
            found.setdefault(field.key, field)
    return found
