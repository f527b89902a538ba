"""One row of a benchmark's file, checked as it is read: an error names file, line, column and what was expected."""

import json
from collections.abc import Collection
from typing import Any

_LONGEST = 60


class Row(dict[str, Any]):
    """One row, which knows where it stands.

    Args:
        values: Its columns.
        where: File and line, which begin an error.
    """

    def __init__(self, values: dict[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where

    def wrong(self, name: str, expected: str) -> ValueError:
        """Return the error that a column is not what was expected."""
        got = _shorten(self[name]) if name in self else f"no {name}"
        return ValueError(f"{self.where}: {name}: got {got}, expected {expected}")

    def text(self, name: str) -> str:
        """Return a column that holds text which is not blank."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(name, "text")
        return value

    def texts(self, name: str, least: int, most: int | None = None) -> list[str]:
        """Return a column that holds a list of texts.

        Args:
            name: The column.
            least: At least this many.
            most: At most this many; None for any number.
        """
        value = self.get(name)
        is_list = isinstance(value, list | tuple) and all(isinstance(text, str) and text.strip() for text in value)
        texts: list[str] = list(value) if is_list and value is not None else []
        if not is_list or len(texts) < least or (most is not None and len(texts) > most):
            size = f"{least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
            raise self.wrong(name, f"a list of {size} text{'s' if least != 1 else ''}")
        return texts

    def index(self, name: str, below: int) -> int:
        """Return a column that holds a position in a list, counted from 0.

        Args:
            name: The column.
            below: How long the list is.
        """
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            raise self.wrong(name, f"a whole number from 0 to {below - 1}")
        return value

    def number(self, name: str) -> int:
        """Return a column that holds a whole number."""
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(name, "a whole number")
        return value

    def one_of(self, name: str, allowed: Collection[str]) -> str:
        """Return a column that holds one of a few words."""
        value = self.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(name, " or ".join(allowed))
        return value


class UniqueIds:
    """Refuses an id that a file holds twice."""

    def __init__(self) -> None:
        self._seen: dict[Any, str] = {}

    def add(self, row: Row, *names: str) -> None:
        """Note a row's id.

        Args:
            row: The row.
            *names: The columns that make its id.

        Raises:
            ValueError: Another row has the same.
        """
        key = tuple(row[name] for name in names)
        if key in self._seen:
            value = ", ".join(_shorten(part) for part in key)
            raise ValueError(
                f"{row.where}: {' and '.join(names)}: got {value} again, expected each once; it stands in "
                f"{self._seen[key].rpartition(', ')[2]}"
            )
        self._seen[key] = row.where


def _shorten(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
