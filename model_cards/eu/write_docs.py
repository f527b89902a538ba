"""Writes the table of all fields into ``docs/documents_for_regulators.md``, from the file that explains them.

Run ``python -m deepseek_model_cards.eu.write_docs docs/documents_for_regulators.md`` after changing a field; a test
compares.
"""

import re
import sys
from pathlib import Path

from deepseek_model_cards.eu.fields import Field, read_forms

_PLACE = re.compile(r"(<!-- fields -->\n).*(<!-- end of fields -->)", re.DOTALL)


def fields_table() -> str:
    """Return a table for each document."""
    parts = []
    for form in read_forms().values():
        lines = [f"### {form.title}", "", "| field | key | asked by | from files |", "| --- | --- | --- | --- |"]
        lines += [_row(field) for field in form.fields]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _row(field: Field) -> str:
    filled = "-" if field.finder is None else "a part" if field.more else "yes"
    title = field.title if field.required else f"{field.title} (optional)"
    return f"| {title} | `{field.key}` | {'; '.join(field.law)} | {filled} |"


def with_table(page: str) -> str:
    """Return a page with the tables between its two marks.

    Args:
        page: The page.
    """
    return _PLACE.sub(lambda match: f"{match[1]}\n{fields_table()}\n{match[2]}", page)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
