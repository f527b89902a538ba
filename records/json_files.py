"""Reads a JSON file that must hold an object, and names the file where it does not.

Used where this package reads a checkpoint or a run; the JSON parser names a line and a column only.
"""

import json
from pathlib import Path
from typing import Any

from deepseek_records.output_paths import check_output


def read_object(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        path: The file.
        what: What it belongs to, for the error: ``model``, ``tokenizer`` or ``run``.

    Raises:
        FileNotFoundError: There is no such file.
        FileExistsError: Its folder is a file.
        ValueError: It is cut short, not text, or holds something else.
    """
    check_output(path.parent, what)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what}: {path}: got no JSON ({error}), expected an object") from None
    if not isinstance(value, dict):
        raise ValueError(f"{what}: {path} holds {type(value).__name__}, expected an object")
    return value
