"""The provider's own answers: one YAML file, a field's key and its value a line, merged into the documents as theirs.

An empty value counts as not answered. What is not a field, not of the field's kind, or must not leave the machine is
refused.
"""

import datetime
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from deepseek_model_cards.eu.entries import CATEGORIES, Entry, Status
from deepseek_model_cards.eu.fields import DOCUMENTS, HIGH_RISK, Field, fields_of, read_forms
from deepseek_model_cards.eu.run_records import RunRecords
from deepseek_records.leaks import find_leaks
from deepseek_records.nearest_name import did_you_mean
from deepseek_records.run_folder import write_text
from deepseek_records.yaml_text import parse_yaml

_HEAD = """# Your answers for `deepseek-moe document RUN OUT --answers FILE`.
#
# A line without a value is not answered. The documents mark what stands here as given by the provider; it is held
# against the run's files where that can be done. Yes and no are `yes` and `no`, dates `2026-01-31`.
"""


def read_answers(path: str | Path, records: RunRecords, *, is_high_risk: bool = False) -> dict[str, Any]:
    """Return the answers in a file by field: texts, dates, truth values, and the category of each data set.

    Args:
        path: The file.
        records: The run's, which know the data sets.
        is_high_risk: Whether the document on a high-risk system is asked for.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A key is not a field, a value not of its kind, or a text holds a secret or a local path.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"--answers: got {path}, expected a YAML file; --write-answers makes one")
    try:
        value = parse_yaml(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"--answers: {path}: got no YAML ({error}), expected answers by field") from None
    if not isinstance(value or {}, dict):
        raise ValueError(f"--answers: {path} holds {type(value).__name__}, expected answers by field")
    asked = fields_of((*DOCUMENTS, HIGH_RISK) if is_high_risk else DOCUMENTS)
    answers = {}
    for key, answer in (value or {}).items():
        if key not in asked:
            raise ValueError(f"--answers: {path}: {_unknown(key, asked)}")
        if answer is None or answer == "" or answer == {}:
            continue
        answers[key] = _read(asked[key], answer, f"--answers: {path}: {key}", records)
    return answers


def _unknown(key: object, asked: Mapping[str, Field]) -> str:
    if key in fields_of([HIGH_RISK]):
        return f"{key} has no effect without --high-risk, whose document asks it"
    hint = did_you_mean(key, asked, cutoff=0.5)
    return f"got the unknown field {key!r}, expected one that --write-answers lists{hint}"


def _read(field: Field, value: Any, where: str, records: RunRecords) -> Any:
    if field.kind == "yes_no":
        words = {"yes": True, "no": False}
        found = words.get(value.strip().lower()) if isinstance(value, str) else value
        if not isinstance(found, bool):
            raise ValueError(f"{where}: got {value!r}, expected yes or no")
        return found
    if field.kind == "date":
        try:
            day = datetime.date.fromisoformat(value.strip()) if isinstance(value, str) else value
        except ValueError:
            day = None
        if isinstance(day, datetime.datetime) or not isinstance(day, datetime.date):
            raise ValueError(f"{where}: got {value!r}, expected a date such as 2026-01-31")
        return day
    if field.kind == "categories":
        return _read_categories(value, where, records)
    text = _read_text(value, where)
    if leaks := find_leaks(text.encode(), is_text=True, folders=[Path.home()]):
        raise ValueError(f"{where}: holds {'; '.join(leaks)}, expected a text that may be published")
    return text


def _read_text(value: Any, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(one, str | int | float) for one in value):
        return "\n".join(str(one).strip() for one in value)
    if not isinstance(value, str | int | float | datetime.date):
        raise ValueError(f"{where}: got {type(value).__name__}, expected a text or a list of texts")
    return ("yes" if value else "no") if isinstance(value, bool) else str(value).strip()


def _read_categories(value: Any, where: str, records: RunRecords) -> dict[str, str]:
    names = {row.name: None for _, _, row in records.training_data()}
    if not isinstance(value, dict):
        raise ValueError(f"{where}: got {type(value).__name__}, expected the category of each data set by its name")
    for name, category in value.items():
        if name not in names:
            known = ", ".join(names) or "none, for no data set is recorded"
            raise ValueError(f"{where}: got the data set {name!r}, expected one of {known}{did_you_mean(name, names)}")
        if category is not None and category not in CATEGORIES:
            expected = ", ".join(CATEGORIES)
            raise ValueError(
                f"{where}.{name}: got {category!r}, expected one of {expected}{did_you_mean(category, CATEGORIES)}"
            )
    return {name: category for name, category in value.items() if category is not None}


def write_answers(
    path: Path, entries: Iterable[Entry], records: RunRecords, given: Mapping[str, Any], names: Iterable[str]
) -> int:
    """Write a file with every field that is open, and the answers that were given, and return how many are open.

    Args:
        path: The file; one that is there is not replaced.
        entries: Of all documents.
        records: The run's.
        given: The answers so far.
        names: The documents.

    Raises:
        FileExistsError: The file is there.
    """
    if path.exists():
        raise FileExistsError(f"--write-answers: {path} is there, expected a new file, for it may hold answers")
    shown: dict[str, Entry] = {}
    for entry in entries:
        if entry.field.key in given or entry.status in (Status.OPEN, Status.PART, Status.DEPENDS):
            shown.setdefault(entry.field.key, entry)
    lines = [_HEAD]
    for name in names:
        form = read_forms()[name]
        lines.append(f"\n# --- {form.title} ---\n")
        for field in form.fields:
            if field.key in shown:
                lines.append(_lines_of(shown.pop(field.key), records, given.get(field.key)))
    write_text(path, "".join(lines))
    return sum(line.count("# Required:") + line.count("# Optional:") for line in lines)


def _lines_of(entry: Entry, records: RunRecords, given: Any) -> str:
    field = entry.field
    word = "Required" if field.required else "Optional"
    only = f", only if {field.when} is yes" if field.when else ""
    lines = [f"\n# {word}: {field.title} ({'; '.join(field.law)}){only}"]
    lines.append(f"# {' '.join(entry.wants.split())}")
    lines += [f"# from {', '.join(map(str, one.sources))}: {one.text}"[:200] for one in entry.found.findings[:3]]
    value = given
    if field.kind == "categories":
        known = given or {}
        value = {row.name: known.get(row.name) for _, _, row in records.training_data()} or None
    body = yaml.safe_dump({field.key: value}, allow_unicode=True, sort_keys=False).replace(": null\n", ":\n")
    return "\n".join([*lines, body])
