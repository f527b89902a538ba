"""Reading a benchmark's rows: embedded ones by default, the user's own by folder."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

EMBEDDED_FOLDER = Path(__file__).resolve().parents[1] / "data"


def read_rows(name: str, data_path: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one JSON Lines file.

    Args:
        name: File name without ``.jsonl`` or ``.jsonl.gz``.
        data_path: A folder holding the user's own file of that name; None for the embedded data.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no JSON object.
    """
    folder = EMBEDDED_FOLDER if data_path is None else Path(data_path)
    for path in (folder / f"{name}.jsonl", folder / f"{name}.jsonl.gz"):
        if path.is_file():
            yield from _parse_lines(path)
            return
    raise FileNotFoundError(f"data: {folder} holds neither {name}.jsonl nor {name}.jsonl.gz")


def _parse_lines(path: Path) -> Iterator[dict[str, Any]]:
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {path}, line {number} is no JSON ({error.msg})") from None
            if not isinstance(row, dict):
                raise ValueError(f"data: {path}, line {number} is {type(row).__name__}, wanted an object")
            yield row
