"""Facts of tables: an item, a period, a value, as TAT-QA and other reports have them.

A table is rows of cells. Its header is the rows before the first one with numbers; a row's first cell names the item.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

_NUMBER = re.compile(r"^[\s$\u20ac\u00a3(-]*\d[\d,]*(?:\.\d+)?[\s)%]*$")
_YEAR = re.compile(r"^\s*(?:19|20)\d\d\s*$")


@dataclasses.dataclass(frozen=True)
class Fact:
    """One number of a table.

    Args:
        table: Its id.
        item: What the row says it is.
        period: What the column's header says.
        value: The number; one in parentheses is negative.
        cell: As it stands there.
        row: Its row, from 0.
        column: Its column, from 0.
    """

    table: str
    item: str
    period: str
    value: float
    cell: str
    row: int
    column: int


def parse_number(cell: str) -> float | None:
    """Return a cell's number, None where it holds none.

    Args:
        cell: Such as ``$ (1,452.4)`` or ``12 %``.
    """
    if not _NUMBER.match(cell):
        return None
    value = float(re.sub(r"[^\d.]", "", cell))
    return -value if "(" in cell or cell.strip().startswith("-") else value


def read_facts(table: str, rows: Sequence[Sequence[str]]) -> Iterator[Fact]:
    """Yield the numbers of a table.

    Args:
        table: Its id.
        rows: Its cells.
    """
    first = next((number for number, row in enumerate(rows) if _has_values(row)), len(rows))
    headers = list(rows[:first])
    section = ""
    for number, row in enumerate(rows[first:], start=first):
        if not _has_values(row):
            section = str(row[0]).strip() if row else ""
            continue
        for column, cell in enumerate(row[1:], start=1):
            value = parse_number(str(cell))
            if value is not None:
                period = " ".join(str(one[column]).strip() for one in headers if column < len(one) and one[column])
                item = str(row[0]).strip() or section
                yield Fact(table, item, period, value, str(cell), number, column)


def _has_values(row: Sequence[str]) -> bool:
    """Numbers other than years: a row of years is a header."""
    cells = [str(cell) for cell in row[1:]]
    return any(parse_number(cell) is not None and not _YEAR.match(cell) for cell in cells)


def wrong_totals(facts: Sequence[Fact], rows: Sequence[Sequence[str]]) -> list[tuple[Fact, float]]:
    """Return totals that are not the sum of what stands above them, each with that sum.

    Only a table's first total counts, where no row above has numbers without a name: such a row is a subtotal. Shares
    are left out, since they need not add up.

    Args:
        facts: Of the table.
        rows: Its cells.
    """
    totals = [fact for fact in facts if re.match(r"total\b", fact.item, re.I)]
    if not totals:
        return []
    row = min(fact.row for fact in totals)
    begin = next((number + 1 for number in range(row - 1, -1, -1) if not _has_values(rows[number])), 0)
    if any(not str(one[0]).strip() for one in rows[begin:row]):
        return []
    found = []
    for total in (fact for fact in totals if fact.row == row):
        if re.search("%|change", total.period + total.cell, re.I):
            continue
        parts = [fact.value for fact in facts if begin <= fact.row < row and fact.column == total.column]
        if len(parts) >= 2 and abs(sum(parts) - total.value) > 0.005 * max(1.0, abs(total.value)):
            found.append((total, sum(parts)))
    return found


def tables_of(value: Any) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield id and cells of each table of TAT-QA's JSON.

    Args:
        value: What `json` read.

    Raises:
        ValueError: It is not of that form.
    """
    if not isinstance(value, list) or not all(isinstance(one, dict) and "table" in one for one in value):
        raise ValueError("tables: got no list of objects with 'table', expected TAT-QA's form")
    known = {str(one["table"].get("uid")): one["table"]["table"] for one in value}  # some come more than once
    for key, cells in known.items():
        yield key, [[str(cell) for cell in row] for row in cells]
