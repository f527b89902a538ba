"""The last look at what is about to leave the machine: secrets and local paths in the bytes of each file."""

import fnmatch
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_records.leaks import find_leaks, secret_values

# Vocabularies hold paths and token-like strings by nature; in them and in weights only exact local values are sought.
OPAQUE_FILES = ("*.safetensors", "tokenizer.json", "vocab.json", "merges.txt", "tokenizer.model", "*.png")


@dataclass(frozen=True)
class UploadFile:
    """One file to send.

    Args:
        path_in_repo: Its name in the repository.
        content: A local file, or the bytes themselves where they are not what lies on disk.
    """

    path_in_repo: str
    content: Path | bytes

    @property
    def num_bytes(self) -> int:
        """The size in bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def check_leaks(files: Sequence[UploadFile], folders: Sequence[Path]) -> None:
    """Refuse to send a file that holds a secret or names a local folder.

    Args:
        files: What would be sent.
        folders: Local folders that must not be named; the root folder is ignored, for it is in every path.

    Raises:
        ValueError: The first such file, with what was found in it but never the secret itself.
    """
    folders = [folder for folder in folders if len(folder.parts) > 1]
    for file in files:
        is_text = not any(fnmatch.fnmatch(file.path_in_repo, pattern) for pattern in OPAQUE_FILES)
        found = find_leaks(_view(file), is_text=is_text, folders=folders)
        if found:
            raise ValueError(f"push: {file.path_in_repo} holds {'; '.join(found)}; nothing was sent")


def describe_search() -> list[str]:
    """Return what `check_leaks` looks for, one line each, without any secret."""
    return [
        f"the values of environment variables whose names sound secret ({len(secret_values())} are set)",
        "the shapes of access tokens, signed web tokens and private keys (text files)",
        "absolute paths (text files)",
        "the names of the run's folder and of the home folder",
    ]


def _view(file: UploadFile) -> bytes | mmap.mmap:
    """The content without reading a checkpoint of many GiB into memory."""
    if isinstance(file.content, bytes) or file.num_bytes == 0:
        return file.content if isinstance(file.content, bytes) else b""
    with open(file.content, "rb") as stream:
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
