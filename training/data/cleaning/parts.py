"""Parts: what the filters made of a batch of documents, kept on disk until the duplicates are known.

Each part is one Parquet file that is there whole or not at all. A run that was killed goes on with those it has.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from deepseek_training.data.cleaning.documents import Document, Examined, hash_text
from deepseek_training.data.cleaning.duplicates import NUM_PERMUTATIONS, sign
from deepseek_training.data.cleaning.examine import Context, examine
from deepseek_training.data.cleaning.personal_data import mask
from deepseek_training.data.cleaning.words import hash_words, words_of

BATCH_DOCUMENTS = 256
_EXCERPT = 300
_SCHEMA = pyarrow.schema(
    [
        *((name, pyarrow.string()) for name in ("text", "source", "file")),
        ("line", pyarrow.int64()),
        *((name, pyarrow.string()) for name in ("unit", "split", "language", "dropped_by", "reason", "changes")),
        *((name, pyarrow.string()) for name in ("origin_sha256", "excerpt")),
        ("num_characters", pyarrow.int64()),
        ("exact", pyarrow.uint64()),
        ("signature", pyarrow.binary()),
    ]
)
_context: Context | None = None


def begin(context: Context) -> None:
    """Keep what the filters need, once in each process.

    Args:
        context: What was fitted.
    """
    global _context
    _context = context


def make_part(task: tuple[Path, list[Document]]) -> Path:
    """Apply the filters to a batch and write its part.

    Args:
        task: The file to write, and the documents.
    """
    assert _context is not None
    path, documents = task
    rows = [_row(examine(document, _context), _context) for document in documents]
    # A process of a killed run may still be at the same part for a moment.
    temporary = path.with_suffix(f".{os.getpid()}.partial")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=_SCHEMA), temporary, compression="zstd")
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return path


def read_parts(paths: list[Path], columns: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each part.

    Args:
        paths: The parts in order.
        columns: Which to read; None: all.
    """
    for path in paths:
        yield pyarrow.parquet.read_table(path, columns=columns).to_pylist()


def _row(examined: Examined, context: Context) -> dict[str, Any]:
    document, recipe = examined.document, context.recipe
    is_compared = "duplicates" in recipe.filters and not examined.dropped_by
    is_shown = bool(examined.dropped_by or examined.changes)
    words = hash_words(words_of(examined.text)) if is_compared else np.zeros(0, np.uint64)
    signature = sign(examined.text, recipe.seed) if is_compared else np.zeros(NUM_PERMUTATIONS, np.uint32)
    # What is shown to a person must not give away what was masked.
    excerpt = mask(document.text[: 2 * _EXCERPT], names=recipe.mask_names)[0][:_EXCERPT] if is_shown else ""
    return {
        "text": "" if examined.dropped_by else examined.text,
        "source": document.source,
        "file": document.file,
        "line": document.line,
        "unit": document.unit,
        "split": document.split or "",
        "language": examined.language,
        "dropped_by": examined.dropped_by,
        "reason": examined.reason,
        "changes": json.dumps(examined.changes, sort_keys=True) if examined.changes else "",
        "origin_sha256": hash_text(document.text),
        "excerpt": excerpt,
        "num_characters": len(document.text),
        "exact": int(hash_text(words.tobytes().hex()), 16) if is_compared else 0,
        "signature": signature.tobytes(),
    }
