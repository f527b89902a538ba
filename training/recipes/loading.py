"""Recipes: one YAML file read into a dataclass, checked, with overrides from the command line.

The training stages declare their settings as dataclass fields made by `setting`; `load_recipe` fills them, and both
``--help`` and the documentation read the explanation from the field itself. Surprising: YAML 1.1 reads ``3e-4`` as a
string, so a float field takes strings that spell a number.
"""

import argparse
import contextlib
import dataclasses
import math
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from deepseek_records.nearest_name import did_you_mean
from deepseek_records.yaml_text import parse_yaml

RECIPE_FOLDER = Path(__file__).parent
_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
RecipeT = TypeVar("RecipeT")


def setting(default: Any = dataclasses.MISSING, *, help: str, otherwise: str = "") -> Any:
    """Return a dataclass field with its one explanation.

    Args:
        default: The value when the recipe leaves the field out; without one the field must be given.
        help: What it means, with unit and legal range. ``--help`` and the docs print this text.
        otherwise: What to do who gave a value of another kind, for the error.
    """
    metadata = {"help": help, "otherwise": otherwise}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def read_settings(path: Path) -> dict[str, Any]:
    """Return what a recipe's file holds, unchecked.

    Args:
        path: From `find_recipe`.

    Raises:
        ValueError: It is not YAML, or no mapping.
    """
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"recipe: {path} is not a text file") from None
    except ValueError as error:
        raise ValueError(f"recipe: {path} is not YAML ({error})") from None
    if not isinstance(settings, dict):
        raise ValueError(f"recipe: {path} holds no settings; write one 'key: value' a line")
    return settings


def load_recipe(name_or_path: str | Path, recipe_class: type[RecipeT], overrides: Any = ()) -> RecipeT:
    """Return the recipe of that name or file, with overrides applied and every value checked.

    Args:
        name_or_path: An embedded recipe's name (see `list_recipes`) or a YAML file.
        recipe_class: A dataclass whose fields are made by `setting`.
        overrides: A mapping, or command-line words such as ``["--seed", "3", "--model.num_hidden_layers=2"]``.
            A mapping setting is merged, not replaced.

    Raises:
        FileNotFoundError: Neither a file nor an embedded recipe has this name.
        ValueError: Not YAML, an unknown key, a value of another type, or one the recipe's own checks refuse.
    """
    path = find_recipe(name_or_path)
    settings = read_settings(path)
    if not isinstance(overrides, dict):
        overrides = parse_overrides(list(overrides))
    for key, value in overrides.items():
        _set_nested(settings, key, value)
    return build_recipe(settings, recipe_class, source=str(name_or_path))


def build_recipe(settings: dict[str, Any], recipe_class: type[RecipeT], *, source: str = "recipe") -> RecipeT:
    """Return the dataclass filled from plain values, each checked against its field's type.

    Args:
        settings: Field names and YAML values.
        recipe_class: The dataclass.
        source: Where the settings come from, for the error message.

    Raises:
        ValueError: An unknown or missing key, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(recipe_class)}
    hints = typing.get_type_hints(recipe_class)
    for key in settings:
        if key not in fields:
            raise ValueError(f"{source}: got the unknown setting '{key}'{_nearest(key, fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in settings:
            raise ValueError(f"{source}: setting '{name}' is missing ({field.metadata['help']})")
    return recipe_class(
        **{key: _check_field(fields[key], value, hints[key], source) for key, value in settings.items()}
    )


def recipe_settings(recipe: Any) -> dict[str, Any]:
    """Return a recipe's resolved settings as plain YAML values, as the run folder stores them."""
    return dataclasses.asdict(recipe)


def list_recipes() -> list[str]:
    """Return the names of the embedded recipes."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """Return the YAML file of an embedded name or a path.

    Raises:
        FileNotFoundError: There is no such recipe; names the nearest one.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    if str(name_or_path) in list_recipes():
        return RECIPE_FOLDER / f"{name_or_path}.yaml"
    names = list_recipes()
    raise FileNotFoundError(
        f"recipe: no file and no embedded recipe '{name_or_path}'{_nearest(str(name_or_path), names)} "
        f"(embedded: {', '.join(names)})"
    )


def offered(recipe_class: type) -> list[dataclasses.Field[Any]]:
    """Return the settings that a stage has an effect for: all but inherited ones that its class lists as `unused`."""
    unused = getattr(recipe_class, "unused", {})
    return [field for field in dataclasses.fields(recipe_class) if field.name not in unused]


def describe_recipe(recipe_class: type) -> list[tuple[str, str, str]]:
    """Return (name, default, explanation) of every setting, for ``--help`` and the docs."""
    rows = []
    for field in offered(recipe_class):
        rows.append((field.name, _default_text(field), field.metadata["help"]))
    return rows


def setting_helps(recipe_class: type) -> dict[str, str]:
    """Return each setting's explanation, for options that a command declares itself."""
    return {field.name: field.metadata["help"] for field in offered(recipe_class)}


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        default = field.default
    else:
        return "none, must be given"
    return yaml.safe_dump(default, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


def add_recipe_arguments(parser: argparse.ArgumentParser, recipe_class: type) -> None:
    """Add the recipe's name and one option a setting; underscores and dashes both work.

    Args:
        parser: The subcommand's parser.
        recipe_class: The dataclass; read the given ones back with `collect_overrides`.
    """
    parser.add_argument("recipe", metavar="RECIPE", help=f"YAML file, or one of {', '.join(list_recipes())}")
    add_setting_arguments(parser, recipe_class)


def add_setting_arguments(
    parser: argparse.ArgumentParser,
    recipe_class: type,
    *,
    but: Collection[str] = (),
    also: Mapping[str, str] | None = None,
) -> None:
    """Add one option a setting; underscores and dashes both work.

    Args:
        parser: The subcommand's parser.
        recipe_class: The dataclass; read the given ones back with `collect_overrides`.
        but: Settings that the command itself decides.
        also: Shorter options by the setting that they give.
    """
    group = parser.add_argument_group(
        "settings", "each replaces the recipe's or the default; YAML syntax for the value"
    )
    for field in offered(recipe_class):
        if field.name in but:
            continue
        text = f"{field.metadata['help']} (default: {_default_text(field)})".replace("%", "%%")
        options = [f"--{field.name.replace('_', '-')}"]
        options += [also[field.name]] if also and field.name in also else []
        kinds = {"dest": f"setting_{field.name}", "default": argparse.SUPPRESS, "metavar": "VALUE"}
        group.add_argument(*options, help=text, **kinds)
        if "_" in field.name:
            group.add_argument(f"--{field.name}", help=argparse.SUPPRESS, **kinds)


def collect_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given on the command line, for `load_recipe`."""
    given = {key: value for key, value in vars(args).items() if key.startswith("setting_")}
    words = {key.removeprefix("setting_"): value for key, value in given.items()}
    return {key: parse_value(key.replace("_", "-"), value) for key, value in words.items()}


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """Return ``--key value`` and ``--key=value`` words as a mapping; values are YAML.

    Raises:
        ValueError: A word that is not an option, or an option without a value.
    """
    overrides, rest = {}, list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"override: '{word}' is not a setting; write --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise ValueError(f"override: --{key} has no value")
            value = rest.pop(0)
        overrides[key.replace("-", "_")] = parse_value(key, value)
    return overrides


def parse_value(key: str, value: str) -> Any:
    """Return the YAML value of an option.

    Args:
        key: The option, without its dashes before.
        value: Its word.

    Raises:
        ValueError: It is not YAML.
    """
    try:
        return parse_yaml(value)
    except ValueError:
        raise ValueError(f"override: --{key} {value!r} is not a YAML value") from None


def _set_nested(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set ``a.b`` inside ``settings["a"]``; a mapping given for a mapping is merged into it."""
    head, _, tail = key.partition(".")
    if tail:
        inner = settings.get(head) or {}
        if not isinstance(inner, dict):
            raise ValueError(f"override: '{head}' is not a mapping, so --{key} sets nothing")
        settings[head] = dict(inner)
        _set_nested(settings[head], tail, value)
    elif isinstance(value, dict) and isinstance(settings.get(head), dict):
        settings[head] = {**settings[head], **value}
    else:
        settings[head] = value


def _nearest(key: str, names: Any) -> str:
    return did_you_mean(key, names, cutoff=0.4, otherwise=f"; known: {', '.join(names)}")


def _check_field(field: Any, value: Any, hint: Any, source: str) -> Any:
    try:
        return _check(field.name, value, hint, source)
    except ValueError as error:
        otherwise = field.metadata.get("otherwise")
        raise ValueError(f"{error}; {otherwise}" if otherwise else str(error)) from None


def _check(name: str, value: Any, hint: Any, source: str) -> Any:
    """Return the value as its field's type, or raise a one-line error."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [item for item in arguments if item is not type(None)]
        is_list = isinstance(value, list) and len(kinds) > 1
        return _check(name, value, kinds[1] if is_list else kinds[0], source)
    if origin is typing.Literal:
        if value not in arguments:
            allowed = ", ".join(map(str, arguments))
            raise ValueError(
                f"{source}: {name}: got {value!r}, expected one of {allowed}{did_you_mean(value, arguments)}"
            )
        return value
    if origin in (list, dict):
        if not isinstance(value, origin):
            raise ValueError(f"{source}: {name}: got {value!r}, expected a {'list' if origin is list else 'mapping'}")
        if origin is list:
            return [_check(name, item, arguments[0], source) for item in value]
        for key in value:
            if not isinstance(key, str):
                raise ValueError(f"{source}: {name}: got the key {key!r}, expected a name")
        return value
    if hint is float and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            if not math.isnan(float(value)):
                return float(value)
    elif isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{source}: {name}: got {_shown(value)}, expected {_NAMES[hint]}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ..."
