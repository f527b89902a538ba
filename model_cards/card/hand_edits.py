"""Whether a ``README.md`` is as this package wrote it, or a person has written in it.

The last line of a card holds a hash of what stands above it. A file without that line, or with another text above it,
is somebody's work and is never written over.
"""

import hashlib
import re
from pathlib import Path

from deepseek_records.run_folder import write_text

_MARK = re.compile(r"\n<!-- written by deepseek-moe; ([0-9a-f]{16}); an edited file is kept -->\s*\Z")


def sign(text: str) -> str:
    """Return a card with the line that tells it from an edited one.

    Args:
        text: The card.
    """
    body = text.rstrip("\n") + "\n"
    return f"{body}\n<!-- written by deepseek-moe; {_digest(body)}; an edited file is kept -->\n"


def is_edited(text: str) -> bool:
    """Tell whether a card holds anything but what `sign` returned.

    Args:
        text: The file's content; line ends of Windows make no difference.
    """
    text = text.replace("\r\n", "\n")
    if _is_template_of_peft(text):
        return False
    found = _MARK.search(text)
    return found is None or _digest(text[: found.start()]) != found[1]


def _is_template_of_peft(text: str) -> bool:
    """The card that PEFT puts beside an adapter: the Hub's template with nothing filled in."""
    if "[More Information Needed]" not in text:
        return False
    from huggingface_hub import ModelCard, ModelCardData

    empty = ModelCard.from_template(ModelCardData()).text
    written = re.sub(r"### Framework versions\n\n- PEFT \S+\s*\Z", "", ModelCard(text).text)
    return written.split() == empty.split()


def write_signed(path: Path, text: str) -> None:
    """Write a card, unless a file with somebody's edits lies there.

    Args:
        path: The ``README.md``.
        text: The card, not yet signed.

    Raises:
        FileExistsError: The file was not written by this package, or was edited since.
    """
    if path.is_symlink() or (path.exists() and is_edited(path.read_text(encoding="utf-8", errors="replace"))):
        raise FileExistsError(
            f"README.md: got {path}, which holds edits or was not written by this command, expected no such file; "
            "pass --output FOLDER, or move it away"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, sign(text))


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]
