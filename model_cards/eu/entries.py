"""A field filled: what files tell of it, what the provider answered, and what is still open."""

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from deepseek_model_cards.eu.fields import Field
from deepseek_model_cards.eu.finders import FINDERS
from deepseek_model_cards.eu.findings import Found
from deepseek_model_cards.eu.run_records import RunRecords

CATEGORY_KEY = "data_categories"
# What the template asks yes or no of, by the category of data sets that answers it.
_ASKED_OF = {
    "public_data": "public",
    "licensed_data": "licensed",
    "private_data": "private",
    "crawled_data": "crawled",
    "user_data": "user",
    "synthetic_data": "synthetic",
    "other_data": "other",
}
CATEGORIES = tuple(_ASKED_OF.values())


class Status(StrEnum):
    """How far a field is filled."""

    FILLED = "from files"
    ANSWERED = "given by the provider"
    PART = "open in part"
    OPEN = "open"
    NOT_APPLICABLE = "not applicable"
    DEPENDS = "depends on another answer"


@dataclass(frozen=True)
class Entry:
    """One field of a document.

    Args:
        field: The field.
        found: What files tell.
        answer: The provider's answer; None where there is none.
        status: How far it is filled.
        wants: What is still to be said; empty where nothing is.
        answered_by: The key that the answer was drawn from, where that is another field's.
        contradiction: Why the answer does not agree with a file, or with another answer; empty where it does.
    """

    field: Field
    found: Found
    answer: Any
    status: Status
    wants: str = ""
    answered_by: str = ""
    contradiction: str = ""

    @property
    def is_missing(self) -> bool:
        """True where the law asks for it and it is open, or open in part."""
        return self.field.required and self.status in (Status.OPEN, Status.PART)

    @property
    def answer_text(self) -> str:
        """The answer as it is shown; empty where there is none."""
        if self.answer is None:
            return ""
        if isinstance(self.answer, bool):
            return "yes" if self.answer else "no"
        if isinstance(self.answer, Mapping):
            return "; ".join(f"{name}: {category}" for name, category in self.answer.items())
        return self.answer.isoformat() if isinstance(self.answer, datetime.date) else str(self.answer)


def fill_field(field: Field, records: RunRecords, answers: Mapping[str, Any]) -> Entry:
    """Return a field with all that is known of it.

    Args:
        field: The field.
        records: What files tell.
        answers: What the provider told, by key.
    """
    found = FINDERS[field.finder](records) if field.finder else Found()
    answer, answered_by = answers.get(field.key), ""
    drawn = _from_categories(field.key, records, answers)
    contradiction = found.contradicts(answer) if found.contradicts is not None and answer is not None else ""
    if answer is None and drawn is not None:
        answer, answered_by = drawn, CATEGORY_KEY
        contradiction = found.contradicts(drawn) if found.contradicts is not None else ""
    elif drawn is not None and answer != drawn:
        contradiction = contradiction or f"{CATEGORY_KEY} says {'yes' if drawn else 'no'}"
    applies = _applies(field, records, answers)
    lacks = "; ".join(filter(None, (found.lacks, field.more)))
    if field.key == CATEGORY_KEY and answer is not None:
        rest = [name for name in _names(records) if name not in answer]
        lacks = f"the category of {', '.join(rest)}" if rest else ""
        answer_is_whole = not rest
    else:
        answer_is_whole = answer is not None
    if applies is not True:
        status = Status.DEPENDS if applies is None else Status.NOT_APPLICABLE
        wants = field.asks if applies is None else ""
    elif answer_is_whole:
        status, wants = Status.ANSWERED, ""
    elif found.findings or found.states or answer is not None:
        status = Status.PART if lacks else Status.FILLED
        wants = lacks
    else:
        status, wants = Status.OPEN, "; ".join(filter(None, (field.asks, found.lacks)))
    return Entry(field, found, answer, status, wants, answered_by, contradiction)


def _names(records: RunRecords) -> list[str]:
    return list(dict.fromkeys(row.name for _, _, row in records.training_data()))


def _from_categories(key: str, records: RunRecords, answers: Mapping[str, Any]) -> bool | None:
    """What the categories of the data sets say to a question, None while one that could say yes has none."""
    categories = answers.get(CATEGORY_KEY)
    asked = _ASKED_OF.get(key)
    if not categories or asked is None:
        return None
    if asked in categories.values():
        return True
    return False if set(_names(records)) <= set(categories) else None


def _applies(field: Field, records: RunRecords, answers: Mapping[str, Any]) -> bool | None:
    """Whether a field applies; None where that is for another answer to say."""
    if not field.conditions:
        return True
    values = []
    for key in field.conditions:
        value = answers.get(key)
        values.append(_from_categories(key, records, answers) if value is None else value)
    return True if True in values else None if None in values else False
