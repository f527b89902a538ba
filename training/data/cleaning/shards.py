"""Writes rows into shards of JSON Lines or Parquet, under names that the Hub and `load_texts` read as splits.

The number of shards is in their names, so they get them when the last one is whole; the same rows give the same bytes.
"""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

_TEMPORARY = ".partial"


class ShardWriter:
    """Shards of one split.

    Args:
        folder: Where they are written.
        split: ``train`` or ``validation``.
        kind: ``jsonl.gz`` or ``parquet``.
        max_bytes: Text of a shard, in bytes.
    """

    def __init__(self, folder: Path, split: str, kind: str, max_bytes: float) -> None:
        self.folder, self.split, self.kind, self.max_bytes = folder, split, kind, max_bytes
        self.num_rows = 0
        self.num_bytes = 0
        self._rows: list[dict[str, Any]] = []
        self._size = 0
        self._written: list[Path] = []

    def add(self, row: dict[str, Any]) -> None:
        """Write one row, now or with the others of its shard.

        Args:
            row: With ``text``.
        """
        size = len(row["text"].encode())
        if self._rows and self._size + size > self.max_bytes:
            self._write()
        self._rows.append(row)
        self._size += size
        self.num_rows += 1
        self.num_bytes += size

    def close(self) -> list[Path]:
        """Write what is left, give the shards their names, and return them."""
        if self._rows:
            self._write()
        total = len(self._written)
        named = []
        for number, path in enumerate(self._written):
            name = self.folder / f"{self.split}-{number:05d}-of-{total:05d}.{self.kind}"
            os.replace(path, name)
            named.append(name)
        return named

    def _write(self) -> None:
        path = self.folder / f"{self.split}-{len(self._written):05d}{_TEMPORARY}"
        if self.kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(self._rows), path, compression="zstd")
        else:
            # No name and no time in the header: equal rows are equal bytes.
            with open(path, "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as file:
                for row in self._rows:
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        self._written.append(path)
        self._rows, self._size = [], 0
