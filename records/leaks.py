"""What must not leave the machine: absolute paths, tokens and the values of secret environment variables.

`scrub` cleans the texts of a run as they are read, so that cards and reports never hold a local path; `find_leaks`
looks at the bytes of a file right before an upload and is the last gate. Surprising: both also look for the *values*
of environment variables whose names sound secret, for those end up in saved settings more often than in source.
"""

import mmap
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# A path of two parts or more; not after a letter, slash, colon, dot or "<": those are URLs, "and/or", HTML tags.
_ABSOLUTE_PATH = re.compile(r"(?<![\w/:.<~-])(?:~|)(?:/[\w.+@-]+){2,}/?|\b[A-Za-z]:\\[\w.\\ -]+")
_TOKEN_SHAPES = (
    r"hf_[A-Za-z0-9]{20,}",
    r"sk-[A-Za-z0-9_-]{20,}",
    r"gh[pousr]_[A-Za-z0-9]{20,}",
    r"github_pat_[A-Za-z0-9_]{20,}",
    r"AKIA[0-9A-Z]{16}",
    r"xox[baprs]-[A-Za-z0-9-]{10,}",
    r"eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
)
_TOKEN = re.compile("|".join(_TOKEN_SHAPES))
# Whole words of a name: TOKENIZER_NAME holds no secret.
_SECRET_NAME = re.compile(
    r"(^|_)(\w*TOKENS?|\w*SECRETS?|\w*PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|\w*API_?KEY|ACCESS_KEY|PRIVATE_KEY)($|_)",
    re.IGNORECASE,
)
_SECRET_SETTING = re.compile(r"(^|_)(token|secret|password|api_key|access_key)$", re.IGNORECASE)
_SHORTEST_SECRET = 8


def scrub(value: Any) -> Any:
    """Return a JSON or YAML value without absolute paths, tokens and secret settings.

    A path keeps its last part (``/home/me/books.txt`` becomes ``books.txt``), a token becomes ``[removed]``, and so
    does the value of any setting named like a secret.

    Args:
        value: Strings, numbers, lists and dictionaries of them.
    """
    if isinstance(value, str):
        return _scrub_text(value)
    if isinstance(value, Mapping):
        return {
            key: "[removed]" if inner and _SECRET_SETTING.search(str(key)) and isinstance(inner, str) else scrub(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(inner) for inner in value]
    return value


def _scrub_text(text: str) -> str:
    for secret in secret_values():
        text = text.replace(secret, "[removed]")
    text = _TOKEN.sub("[removed]", text)
    return _ABSOLUTE_PATH.sub(lambda match: re.split(r"[/\\]", match[0].rstrip("/\\"))[-1], text)


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the values of environment variables whose names sound secret, longest first.

    Args:
        environment: The variables; values shorter than eight characters are left out, for they match by chance.
    """
    values = {value for name, value in environment.items() if _SECRET_NAME.search(name)}
    return sorted((value for value in values if len(value) >= _SHORTEST_SECRET), key=len, reverse=True)


def _names_folder(content: bytes | mmap.mmap, folder: Path) -> bool:
    """Whether the folder's name occurs; one as short as /root only as a whole, for .../rootcause is none of it."""
    name = str(folder).encode()
    if len(folder.parts) > 2:
        return content.find(name) >= 0
    return re.search(rb"(?<![\w.-])" + re.escape(name) + rb"(?![\w-])", content) is not None


def find_leaks(content: bytes | mmap.mmap, *, is_text: bool, folders: Iterable[Path] = ()) -> list[str]:
    """Name what in a file must not be uploaded; never the secret itself.

    Args:
        content: The bytes of the file, in memory or mapped.
        is_text: Look for token shapes and any absolute path too; in weights those would match by chance, so there
            only exact values and folders are looked for.
        folders: Local folders whose names must not occur, such as the run's own and the home folder.

    Returns:
        One short description a finding, empty when clean.
    """
    found = []
    if any(content.find(secret.encode()) >= 0 for secret in secret_values()):
        found.append("the value of a secret environment variable")
    found += [f"the local folder {folder}" for folder in folders if _names_folder(content, folder)]
    if is_text:
        text = bytes(content).decode("utf-8", errors="replace")
        if _TOKEN.search(text):
            found.append("something shaped like an access token")
        path = _ABSOLUTE_PATH.search(text)
        if path:
            found.append(f"an absolute path ({path[0][:40]})")
    return found
