"""Lines that stand in many documents of a source: navigation, notices, footers.

They are taken out of the documents and the rest stays. What counts as many is told from a sample.
"""

from collections import Counter
from collections.abc import Iterable

from deepseek_training.data.cleaning.documents import hash_text

_MIN_CHARACTERS = 12
_MIN_DOCUMENTS, _MIN_SHARE = 8, 0.005


def find_boilerplate(texts: Iterable[str]) -> frozenset[str]:
    """Return the hashes of lines that stand in many of the texts.

    Args:
        texts: A sample of one source.
    """
    counts: Counter[str] = Counter()
    num_texts = 0
    for text in texts:
        num_texts += 1
        counts.update({key for key in map(_key, text.split("\n")) if key})
    least = max(_MIN_DOCUMENTS, _MIN_SHARE * num_texts)
    return frozenset(key for key, count in counts.items() if count >= least)


def remove_boilerplate(text: str, known: frozenset[str]) -> tuple[str, int]:
    """Return the text without lines that are boilerplate, and how many there were.

    Args:
        text: The text.
        known: From `find_boilerplate`.
    """
    if not known:
        return text, 0
    lines = text.split("\n")
    kept = [line for line in lines if _key(line) not in known]
    return "\n".join(kept) if len(kept) < len(lines) else text, len(lines) - len(kept)


def _key(line: str) -> str:
    line = line.strip()
    return hash_text(line) if len(line) >= _MIN_CHARACTERS else ""
