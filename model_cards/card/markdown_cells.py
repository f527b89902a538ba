"""Text from outside as cells of a Markdown table: a pipe, a line break or a tag in it must not break the table."""

import dataclasses
from collections.abc import Mapping
from typing import Any


def escape_cells(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return some of the values with every text in them escaped for a table.

    Args:
        values: Rows by name.
        names: Which of them stand in tables.
    """
    return {name: _escape(values[name]) for name in names}


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return escape_cell(value)
    if isinstance(value, Mapping):
        return {key: _escape(inner) for key, inner in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _escape(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    if isinstance(value, list | tuple):
        return type(value)(_escape(inner) for inner in value)
    return value


def escape_cell(text: str) -> str:
    """Return a text as one cell.

    Args:
        text: Any text.
    """
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`")
    return text.replace("<", "&lt;").replace("&lt;=", "<=").replace("&lt; ", "< ")
