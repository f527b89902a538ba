"""What files tell of one field: sentences, each with the files and the places in them that it was read from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where a sentence was read.

    Args:
        file: The file, as seen from the run; of a stage elsewhere with its folder's name before it.
        keys: The places in it, dots between names and numbers of a JSON or YAML file.
    """

    file: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.file}: {', '.join(self.keys)}" if self.keys else self.file


@dataclass(frozen=True)
class Finding:
    """One sentence on a field.

    Args:
        text: The sentence.
        sources: Where it was read.
    """

    text: str
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Found:
    """What files tell of a field.

    Args:
        findings: The sentences, none where they tell nothing.
        lacks: What of the question they leave open; empty where nothing is.
        contradicts: Given the provider's answer, why it does not agree with a file; empty where it does.
        states: What is known although no file of the run says it, such as that something was not measured.
    """

    findings: tuple[Finding, ...] = ()
    lacks: str = ""
    contradicts: Callable[[Any], str] | None = None
    states: str = ""


def one(text: str, file: str, *keys: str) -> Finding:
    """Return a sentence that was read from one file.

    Args:
        text: The sentence.
        file: The file.
        *keys: The places in it.
    """
    return Finding(text, (Source(file, keys),))
