"""What must not leave the machine: local paths, tokens, passwords and the values of secret environment variables.

`scrub` cleans the texts of a run as they are read, so that cards and reports never hold a local path; `inspect_files`
looks at what is about to be uploaded and is the last gate, by `find_leaks` for each file. All look for the
*values* of environment variables that hold secrets too, for those end up in saved settings more often than in source.
"""

import fnmatch
import mmap
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_records.secret_shapes import (
    NAMED,
    NAMED_SECRET,
    PACKED,
    PATH,
    SECRET_SETTING,
    TOKEN,
    TOKEN_BYTES,
    TOKENS,
    has_entropy,
    is_secret_variable,
    library_patterns,
    parts_to_hide,
    person_pattern,
)

# Vocabularies hold paths by nature and weights hold anything: in them tokens, local folders and secret values count.
OPAQUE_FILES = ("*.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "*.png", "*.gguf")
_SHORTEST_SECRET = 8


@dataclass(frozen=True)
class LeakReport:
    """What was looked for in files that are to be sent, and what was found.

    Args:
        looked_for: One line for each kind.
        found: By file, one short description for each finding; never the secret itself.
        num_files: Files looked at.
    """

    looked_for: tuple[str, ...]
    found: dict[str, list[str]]
    num_files: int

    def __str__(self) -> str:
        lines = [f"searched {self.num_files} files for", *(f"  {line}" for line in self.looked_for)]
        lines += [f"{name} holds {'; '.join(kinds)}" for name, kinds in self.found.items()]
        return "\n".join(lines if self.found else [*lines, "found nothing"])


def scrub(value: Any) -> Any:
    """Return a JSON or YAML value without local paths, tokens and secret settings.

    A path keeps its last part (``/home/me/books.txt`` becomes ``books.txt``), a token becomes ``[removed]``, and so
    does the value of any setting named like a secret.

    Args:
        value: Strings, numbers, lists and dictionaries of them.
    """
    if isinstance(value, str):
        return _scrub_text(value)
    if isinstance(value, Mapping):
        return {
            key: "[removed]" if inner and SECRET_SETTING.search(str(key)) and isinstance(inner, str) else scrub(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(inner) for inner in value]
    return value


def _scrub_text(text: str) -> str:
    for secret in secret_values():
        text = text.replace(secret, "[removed]")
    text = TOKEN.sub("[removed]", text)
    text = NAMED_SECRET.sub(_remove_named, text)
    text = PATH.sub(_keep_last_part, text)
    person = person_pattern(Path.home().name)
    return person.sub(_keep_last_part, text) if person else text


def _remove_named(match: re.Match[str]) -> str:
    """Keep the option, the variable or the scheme, which say what stood there."""
    start = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://|(?i:bearer|basic)\s+|[\w-]+(?:\s?=\s?|\s+)", match[0])
    end = "@" if match[0].endswith("@") else ""
    return f"{start[0] if start else ''}[removed]{end}"


def _keep_last_part(match: re.Match[str]) -> str:
    return re.split(r"[/\\]", match[0].rstrip("/\\"))[-1]


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return the values of environment variables that hold secrets, longest first.

    Args:
        environment: The variables; values shorter than eight characters are left out, for they match by chance.
    """
    secrets = (value for name, value in environment.items() if is_secret_variable(name, value))
    values = {part for value in secrets for part in parts_to_hide(value)}
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
        is_text: Look for any local path and for secrets by their surroundings too; in vocabularies and weights those
            would match by chance, so there only tokens, exact values and folders are looked for.
        folders: Local folders whose names must not occur, such as the run's own and the home folder.

    Returns:
        One short description for each finding, empty when clean.
    """
    found = []
    if any(content.find(secret.encode()) >= 0 for secret in secret_values()):
        found.append("the value of a secret environment variable")
    found += [f"the local folder {folder}" for folder in folders if _names_folder(content, folder)]
    if not is_text:
        # Of weights the head, where texts stand; the numbers behind it are long and mean nothing.
        if TOKEN_BYTES.search(content[: _head_size(content)]):
            found.append("something shaped like an access token")
        return found
    return found + _find_in_text(bytes(content).decode("utf-8", errors="replace"))


def _head_size(content: bytes | mmap.mmap) -> int:
    size = int.from_bytes(content[:8], "little")
    is_safetensors = content[8:9] == b"{" and size < 100 << 20
    return size + 8 if is_safetensors else len(content)


def _find_in_text(text: str) -> list[str]:
    found = []
    if TOKEN.search(text):
        found.append("something shaped like an access token")
    text = PACKED.sub(" ", text)
    found += [kind for kind, pattern in NAMED.items() if re.search(pattern, text)]
    for kind, patterns in library_patterns().items():
        if any(has_entropy(match[0]) for pattern in patterns for match in pattern.finditer(text)):
            found.append(f"something shaped like a secret of {kind}")
            break
    path = PATH.search(text)
    person = person_pattern(Path.home().name)
    if path:
        found.append(f"an absolute path ({path[0][:40]})")
    elif person and person.search(text):
        found.append("a person's name in a path")
    return found


def describe_search() -> tuple[str, ...]:
    """Return what `find_leaks` looks for, one line for each kind."""
    num_values = len(secret_values())
    library = library_patterns()
    return (
        f"access tokens of {', '.join(TOKENS)}",
        f"detect-secrets: {', '.join(library)}" if library else "(detect-secrets is not installed)",
        ", ".join(NAMED),
        f"the values of {num_values} environment variables that hold secrets by their name or form",
        "absolute paths, file:// addresses, Windows and network paths, ~user, people's names in paths",
        "in vocabularies and weights: tokens, those values, and the local folders",
    )


def inspect_files(
    files: Mapping[str, Path | bytes], *, folders: Iterable[Path] = (), within: Iterable[Path] = ()
) -> LeakReport:
    """Look for leaks in files that are to be sent.

    Args:
        files: By the name each will have, a local file or the bytes themselves.
        folders: Local folders that must not be named; the root folder is ignored, for it is in every path.
        within: Folders that local files must lie in, links followed; by default each file's own.

    Returns:
        What was looked for and what was found.
    """
    named = [folder for folder in folders if len(folder.parts) > 1]
    roots = [folder.resolve() for folder in within]
    found = {}
    for name, content in files.items():
        if isinstance(content, Path) and not _is_inside(content, roots):
            found[name] = ["a link out of its folder"]
            continue
        is_text = not any(fnmatch.fnmatch(Path(name).name, pattern) for pattern in OPAQUE_FILES)
        if kinds := find_leaks(_view(content), is_text=is_text, folders=named):
            found[name] = kinds
    return LeakReport((*describe_search(), "links that leave their folder"), found, len(files))


def _is_inside(path: Path, roots: list[Path]) -> bool:
    real = path.resolve()
    return any(real.is_relative_to(root) for root in roots or [path.parent.resolve()])


def _view(content: Path | bytes) -> bytes | mmap.mmap:
    """The content without reading a checkpoint of many GiB into memory."""
    if isinstance(content, bytes) or content.stat().st_size == 0:
        return content if isinstance(content, bytes) else b""
    with open(content, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
