"""A task of the user's own: rows in a file, and a few lines of YAML that say how to ask them.

    name: capitals
    kind: choice                 # the likeliest choice wins; or generation: the text written is compared
    data: capitals.csv           # beside this file; .jsonl[.gz] or .csv
    prompt: "The capital of {country} is"
    choices: [first, second]     # columns; or the name of one column that holds a list
    answer: right                # the column with the choice's text, or its position from 0; for generation the text

    name: my_pages
    kind: text                   # bits per byte of whole documents
    data: pages                  # a file, a folder or a Hub id, as the training stages read them
    split: validation            # or train; all without it
    column: body                 # of tables, where it is not called text

Called by `deepseek_eval.tasks.catalogue.find_task` for a name that ends in ``.yaml``.
"""

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from deepseek_eval.tasks import bits_per_byte
from deepseek_eval.tasks.row import Row
from deepseek_eval.tasks.rows import find_source, read_rows
from deepseek_eval.tasks.task import ChoiceItem, CompletionItem, DataSet, Figure, Task, TextItem
from deepseek_records.document_files import SPLITS
from deepseek_records.yaml_text import parse_yaml

_ABOUT = ("label", "license", "measures")
# By kind, the settings that it needs and those that it may have.
_SETTINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "choice": (("name", "kind", "data", "prompt", "choices", "answer"), _ABOUT),
    "generation": (("name", "kind", "data", "prompt", "answer"), (*_ABOUT, "max_new_tokens", "stop")),
    "text": (("name", "kind", "data"), (*_ABOUT, "split", "column")),
}


def load_task(path: Path) -> Task:
    """Return the task that a YAML file describes.

    Args:
        path: The file.

    Raises:
        FileNotFoundError: The file or its data is not there.
        ValueError: It is not YAML, or a setting is missing, unknown or wrong.
    """
    given = _read_yaml(path)
    if given["kind"] == "text":
        return _text_task(path, given)
    source = path.parent / str(given["data"])
    if not source.is_file():
        raise FileNotFoundError(f"{path}: data: {source} does not exist, expected a .jsonl or .csv file")
    is_choice = given["kind"] == "choice"
    rows = partial(read_rows, source.name, source)
    name = str(given["name"])
    figures = (Figure("acc", "accuracy" if is_choice else "exact match", is_share=True),)
    return Task(
        name=name,
        kind="continuation" if is_choice else "completion",
        build_items=partial(_build_choices if is_choice else _build_requests, given, rows),
        data=DataSet(
            name=source.name,
            label=str(given.get("label", name)),
            split="",
            license=str(given.get("license", "not stated")),
            source="own data",
            num_questions=sum(1 for _ in rows()),
        ),
        figures=figures,
        measures=str(given.get("measures", "own")),
        max_new_tokens=int(given.get("max_new_tokens", 32)),
        metric_inputs=None if is_choice else _compare_texts,
        has_chat=is_choice,
    )


def _text_task(path: Path, given: dict[str, Any]) -> Task:
    beside = path.parent / given["data"]
    source = beside if beside.exists() else find_source(given["data"])
    options = {"split": given.get("split", "all"), "column": given.get("column")}
    name = given["name"]

    def build(num_fewshot: int, limit: int | None, data_path: str | Path | None) -> Iterator[TextItem]:
        return bits_per_byte.documents_of(name, source, limit, **options)

    return replace(
        bits_per_byte.TASK,
        name=name,
        build_items=build,
        data=DataSet(
            name=beside.name if beside.exists() else given["data"],
            label=given.get("label", name),
            split=given.get("split", ""),
            license=given.get("license", "not stated"),
            source="own data",
            num_questions=sum(1 for _ in build(0, None, None)),
        ),
        measures=given.get("measures", "language"),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"tasks: {path} does not exist")
    try:
        given = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"tasks: {path} is not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise ValueError(f"tasks: {path}: got {type(given).__name__}, expected settings")
    _check_names(path, given)
    choices = given.get("choices")
    is_columns = isinstance(choices, list) and len(choices) > 1 and all(isinstance(name, str) for name in choices)
    if given["kind"] == "choice" and not (isinstance(choices, str) or is_columns):
        raise ValueError(f"{path}: choices: got {choices!r}, expected a column, or a list of two or more columns")
    tokens = given.get("max_new_tokens", 32)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"{path}: max_new_tokens: got {tokens!r}, expected 1 or more")
    return given


def _check_names(path: Path, given: dict[str, Any]) -> None:
    """Refuse an unknown kind, a setting that the kind has not, and one without text."""
    if given.get("kind") not in _SETTINGS:
        raise ValueError(f"{path}: kind: got {given.get('kind')!r}, expected {' or '.join(_SETTINGS)}")
    needed, optional = _SETTINGS[given["kind"]]
    for name in given:
        if name not in (*needed, *optional):
            known = ", ".join((*needed, *optional))
            raise ValueError(f"{path}: got the unknown key {name!r}, expected for a {given['kind']} task: {known}")
    is_text = [name for name in (*needed, *_ABOUT, "column") if name in needed or name in given]
    for name in is_text:
        if name != "choices" and (not isinstance(given.get(name), str) or not given[name].strip()):
            raise ValueError(f"{path}: {name}: got {given.get(name)!r}, expected text")
    if not re.fullmatch(r"[a-z0-9_]+", given["name"]):
        raise ValueError(f"{path}: name: got {given['name']!r}, expected small letters, digits and _")
    if given.get("split", "all") not in SPLITS:
        raise ValueError(f"{path}: split: got {given['split']!r}, expected {' or '.join(SPLITS)}")


def _fill(given: dict[str, Any], row: Row) -> str:
    """The prompt with the row's columns in it."""
    for _, name, _, _ in string.Formatter().parse(given["prompt"]):
        if name is not None and name not in row:
            raise row.wrong(name, "a column that the prompt names")
    prompt = given["prompt"].format_map(row)
    if not prompt.strip():
        raise row.wrong("prompt", "text")
    return prompt


def _build_choices(
    given: dict[str, Any], rows: Any, num_fewshot: int, limit: int | None, data_path: str | Path | None
) -> Iterator[ChoiceItem]:
    for index, row in enumerate(rows()):
        columns = given["choices"]
        choices = row.texts(columns, 2) if isinstance(columns, str) else [row.text(name) for name in columns]
        if len(set(choices)) != len(choices):
            raise ValueError(f"{row.where}: choices: got one twice, expected different ones")
        target = _find(row, given["answer"], choices)
        if limit is None or index < limit:
            prompt = _fill(given, row)
            yield ChoiceItem(
                id=f"{given['name']}/{index}",
                prompt=prompt,
                choices=tuple(f" {choice.strip()}" for choice in choices),
                target=target,
                group=given["name"],
            )


def _find(row: Row, name: str, choices: Sequence[str]) -> int:
    """The right choice: its text, or its position."""
    value = row.get(name)
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    if isinstance(value, str) and re.fullmatch("[0-9]+", value):  # a CSV file has no numbers
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise row.wrong(name, f"a choice's text or a whole number from 0 to {len(choices) - 1}")


def _build_requests(
    given: dict[str, Any], rows: Any, num_fewshot: int, limit: int | None, data_path: str | Path | None
) -> Iterator[CompletionItem]:
    stop = given.get("stop", ["\n"])
    for index, row in enumerate(rows()):
        target = row.text(given["answer"])
        if limit is None or index < limit:
            yield CompletionItem(
                id=f"{given['name']}/{index}",
                prompt=_fill(given, row),
                target=target,
                group=given["name"],
                stop=tuple(stop) if isinstance(stop, list) else (str(stop),),
                is_request=False,
            )


def _compare_texts(items: Sequence[CompletionItem], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `choice_accuracy` takes: 0 for the right text, whatever its case and the spaces around it, else -1."""
    right = [row["prediction"].strip().casefold() == row["target"].strip().casefold() for row in rows]
    return {"predictions": [0 if hit else -1 for hit in right], "references": [0] * len(rows)}
