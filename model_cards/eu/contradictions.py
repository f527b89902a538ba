"""Whether a provider's answer agrees with a file, as far as a program can tell: numbers, names, dates, yes or no."""

import datetime
import re
from collections.abc import Callable, Iterable
from typing import Any

Check = Callable[[Any], str]
# An answer is a rounded figure: 1.7 million for 1,702,976.
TOLERANCE = 0.06
_UNITS = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "b": 1e9, "billion": 1e9, "t": 1e12, "trillion": 1e12}
_NUMBER = re.compile(
    r"(?<![\w.])(\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?)(?:\s*[*x\u00d7]\s*10\s*(?:\^|\*\*)\s*(\d+))?\s*"
    r"(k|m|b|t|thousand|million|billion|trillion)?\b",
    re.IGNORECASE,
)


def numbers_in(text: str) -> list[float]:
    """Return the numbers in a text: ``1,702,976``, ``1.7 million``, ``1.7M``, ``1.7e6`` and ``1.7*10^6``.

    Args:
        text: The text.
    """
    found = []
    for digits, power, unit in _NUMBER.findall(text):
        value = float(digits.replace(",", ""))
        found.append(value * 10.0 ** int(power or 0) * _UNITS.get(unit.lower(), 1.0))
    return found


def check_number(value: float, where: str) -> Check:
    """Return a check that an answer with numbers in it has the file's among them.

    Args:
        value: The file's.
        where: The file and the place in it.
    """

    def check(answer: Any) -> str:
        numbers = numbers_in(str(answer))
        if not numbers or any(abs(number - value) <= TOLERANCE * abs(value) for number in numbers):
            return ""
        return f"{where} says {value:,.15g}"

    return check


def check_names(names: Iterable[str], where: str) -> Check:
    """Return a check that an answer names each of several things.

    Args:
        names: What the file names.
        where: The file and the place in it.
    """
    wanted = tuple(names)

    def check(answer: Any) -> str:
        text = str(answer).lower()
        lacking = [name for name in wanted if name.lower() not in text]
        return f"{where} names {', '.join(lacking)}" if lacking else ""

    return check


def check_not_before(day: str | None, where: str) -> Check | None:
    """Return a check that a date is not before a day.

    Args:
        day: The day, ISO 8601, maybe with a time; None: there is nothing to check.
        where: The file and the place in it.
    """
    if day is None:
        return None
    first = day[:10]

    def check(answer: Any) -> str:
        return f"{where} says {first}" if isinstance(answer, datetime.date) and answer.isoformat() < first else ""

    return check


def check_no(what: str, where: str) -> Check:
    """Return a check that an answer is not "no" where a file shows the thing.

    Args:
        what: What the file shows.
        where: The file and the place in it.
    """

    def check(answer: Any) -> str:
        return f"{where} says {what}" if answer is False else ""

    return check
