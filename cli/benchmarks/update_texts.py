"""The texts of ``deepseek-moe bench update``: a first one and five that come after it, all at hand offline."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from deepseek_training.continual.held_out_units import LEAST_DOCUMENTS
from deepseek_training.data.texts import load_texts, read_rows

FIRST = "dialogues"
LATER = ("books", "medicine", "finance", "prose_zh", "python")
# UTF-8 bytes of each text that is trained on at most, and of one document.
_TRAIN_BYTES, _DOCUMENT_BYTES = 600_000, 6_000


@dataclass(frozen=True)
class LessonTexts:
    """One text.

    Attributes:
        name: As tables carry it.
        train: Documents to train on.
        held_out: Documents that are never trained on.
        of_gate: Others, for a gate; where documents are few, the second halves of the same.
    """

    name: str
    train: list[str]
    held_out: list[str]
    of_gate: list[str]


def read_lesson(name: str) -> LessonTexts:
    """Return a text of the sequence.

    Args:
        name: `FIRST`, or one of `LATER`.
    """
    if name == "python":
        documents = _python_files()
        held_out = [text for text in documents if hashlib.sha256(text.encode()).digest()[0] % 10 == 0]
        train = [text for text in documents if text not in held_out]
    elif name == FIRST:
        rows = list(read_rows(name))
        train, held_out = (
            [f"{row['prompt']}\n{row['answer']}" for row in rows if row["split"] == split]
            for split in ("train", "validation")
        )
    else:
        train, held_out = load_texts(name, "train"), load_texts(name, "validation")
    return LessonTexts(name, _cut(train), *_in_two(held_out))


def _in_two(texts: list[str]) -> tuple[list[str], list[str]]:
    if len(texts) >= 2 * LEAST_DOCUMENTS:
        return texts[::2], texts[1::2]
    return [text[: len(text) // 2] for text in texts], [text[len(text) // 2 :] for text in texts]


def _python_files() -> list[str]:
    """Modules of this Python's standard library, whose license allows any use; each from its beginning."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="ignore")[:_DOCUMENT_BYTES] for path in paths]
    return [text for text in texts if len(text) > 500]


def _cut(texts: list[str]) -> list[str]:
    """Whole documents, the same share of the long ones, up to `_TRAIN_BYTES`."""
    share = min(1.0, _TRAIN_BYTES / sum(len(text.encode()) for text in texts))
    return [text[: max(200, int(len(text) * share))] for text in texts]
