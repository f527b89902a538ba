"""Frozen dataclasses to JSON and back, with one line on the first value that does not fit.

Called by `deepseek_records.summary` and `deepseek_records.environment`. A field may be a string, a number, a truth
value, a `Literal`, another dataclass, a tuple or a mapping of these, each also with ``None``. A field at its default
is left out of the JSON.
"""

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from deepseek_records.nearest_name import did_you_mean

Record = TypeVar("Record")
_SCALARS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}
_LONGEST = 60


def to_json(record: Any) -> dict[str, Any]:
    """Return a dataclass as a plain dictionary, fields at their default left out.

    Args:
        record: A dataclass of the kinds named above.
    """
    return {
        field.name: _plain(getattr(record, field.name))
        for field in dataclasses.fields(record)
        if not _is_default(field, getattr(record, field.name))
    }


def _is_default(field: dataclasses.Field[Any], value: Any) -> bool:
    if field.default_factory is not dataclasses.MISSING:
        return value == field.default_factory()
    return field.default is not dataclasses.MISSING and type(value) is type(field.default) and value == field.default


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_json(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def from_json(kind: type[Record], value: Any, where: str) -> Record:
    """Return the dataclass that a JSON object holds.

    Args:
        kind: The dataclass.
        value: What `json` read.
        where: The file or the place in it, which begins the error.

    Raises:
        ValueError: A key is missing or unknown, or a value is of another type; the message names the place.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {_shorten(value)}, expected an object")
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind))}
    for name in value:
        if name not in fields:
            hint = did_you_mean(name, fields)
            raise ValueError(f"{where}: got the unknown key {name!r}, expected one of {', '.join(fields)}{hint}")
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: got no {name}, expected one")
    hints = get_type_hints(kind)
    return kind(**{name: _read(hints[name], inner, _join(where, name)) for name, inner in value.items()})


def _join(where: str, name: str) -> str:
    return f"{where}: {name}" if where.endswith(".json") else f"{where}.{name}"


def _read(kind: Any, value: Any, where: str) -> Any:
    """The value as its type hint wants it."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return _read(kind, value, where)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{where}: got {_shorten(value)}, expected {' or '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}: got {_shorten(value)}, expected a list")
        return tuple(_read(arguments[0], inner, f"{where}[{index}]") for index, inner in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: got {_shorten(value)}, expected an object")
        return {name: _read(arguments[1], inner, f"{where}.{name}") for name, inner in value.items()}
    if dataclasses.is_dataclass(kind):
        return from_json(cast(Any, kind), value, where)
    return _read_scalar(kind, value, where)


def _read_scalar(kind: type, value: Any, where: str) -> Any:
    allowed = (int, float) if kind is float else (kind,)
    is_fit = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if is_fit and isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where}: got {value}, expected a finite number")
    if not is_fit:
        raise ValueError(f"{where}: got {_shorten(value)}, expected {_SCALARS[kind]}")
    return value


def _shorten(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 4]} ..."
