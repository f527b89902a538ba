"""The last look at what is about to leave the machine: secrets and local paths in the bytes of each file."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_records import leaks
from deepseek_records.leaks import inspect_files


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
    report = inspect_files({file.path_in_repo: file.content for file in files}, folders=folders)
    for name, found in report.found.items():
        raise ValueError(f"push: {name} holds {'; '.join(found)}; nothing was sent")


def describe_search() -> list[str]:
    """Return what `check_leaks` looks for, one line each, without any secret."""
    return [
        *leaks.describe_search(),
        "the names of the run's folder and of the home folder",
        "links out of their folder",
    ]
