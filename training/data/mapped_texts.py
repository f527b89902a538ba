"""Documents with what decides their split, in memory or, of large sources, in an Arrow file that is read from disk.

`read_documents` is what `Corpus` reads sources by. A source of `LEAST_MAPPED_BYTES` or more is copied once into the
cache, under a hash of its content, and its texts are read from there: no more than a batch is ever in memory.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc

from deepseek_records.data_folders import data_files
from deepseek_records.document_files import TEXT_SUFFIXES, split_mask
from deepseek_records.row_files import COMPRESSED_SUFFIXES, TABLE_SUFFIXES, hub_revision, is_hub_id, load_hub_data
from deepseek_training.data.arrow_cache import write_once
from deepseek_training.data.texts import EMBEDDED, read_rows

LEAST_MAPPED_BYTES = 64_000_000
_BATCH_CHARACTERS = 4_000_000
_PACKED = 4  # a compressed file holds about this many times its size
_FORMAT = "1"  # of the cached texts; a change of the columns or the reading makes other files
_FEATURES = datasets.Features(
    {
        "text": datasets.Value("large_string"),
        "split": datasets.Value("string"),
        "hash": datasets.Value("int64"),
        "num_bytes": datasets.Value("int64"),
    }
)


class MappedTexts(Sequence[str]):
    """Texts of an Arrow file.

    Args:
        rows: With the columns `text` and `num_bytes`.
        indices: Which rows, ascending.
        fingerprint: Tells their content.
    """

    def __init__(self, rows: datasets.Dataset, indices: np.ndarray, fingerprint: str) -> None:
        self.rows, self.indices, self.fingerprint = rows, indices, fingerprint

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return str(self.rows.data.column("text")[int(self.indices[index])])

    def __iter__(self) -> Iterator[str]:
        for batch in self.batches():
            yield from batch

    def batches(self) -> Iterator[list[str]]:
        """Yield the texts in order, some at once.

        The file is read, not mapped: pages that are mapped count as memory of the process until others need it.
        """
        begin = 0
        with pyarrow.OSFile(self.rows.cache_files[0]["filename"]) as file, pyarrow.ipc.open_stream(file) as batches:
            for batch in batches:
                first, last = (int(np.searchsorted(self.indices, place)) for place in (begin, begin + len(batch)))
                if first < last:
                    yield batch.column("text").take(pyarrow.array(self.indices[first:last] - begin)).to_pylist()
                begin += len(batch)

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of all texts."""
        sizes = self.rows.data.column("num_bytes").to_numpy()
        return int(sizes[self.indices].sum())


@dataclasses.dataclass(frozen=True)
class Documents:
    """All documents of a source.

    Attributes:
        name: The source, for errors.
        texts: None of them empty.
        splits: Of each, what its source calls its split; empty for nothing.
        hashes: Of each the first 8 bytes of its SHA-256, uint64.
        fingerprint: Tells the content; empty for what is in memory.
    """

    name: str
    texts: Sequence[str] | datasets.Dataset
    splits: np.ndarray
    hashes: np.ndarray
    fingerprint: str = ""

    def choose(self, split: str, share: float | None = None) -> tuple[Sequence[str], np.ndarray]:
        """Return the texts of a split, and their hashes.

        Args:
            split: ``train``, ``validation`` or ``all``.
            share: Of documents that are validation, where the source tells of no splits; None: one in ten.

        Raises:
            ValueError: There are none.
        """
        mask = split_mask(self.splits, self.hashes, split, self.name, share=share)
        indices = np.flatnonzero(mask)
        if isinstance(self.texts, datasets.Dataset):
            return MappedTexts(self.texts, indices, f"{self.fingerprint}-{split}-{share}"), self.hashes[indices]
        return [self.texts[int(index)] for index in indices], self.hashes[indices]


def read_documents(name: str, *, column: str | None = None, encoding: str = "utf-8") -> Documents:
    """Return the documents of a source; a large one is cached.

    Args:
        name: As for `load_texts`.
        column: Likewise.
        encoding: Of all files but Parquet.

    Raises:
        FileNotFoundError: Nothing lies there.
        OSError: A large one cannot be cached.
        ValueError: As for `load_texts`.
    """
    if _size(name) < LEAST_MAPPED_BYTES or not datasets.is_caching_enabled():
        rows = [columns for columns in _batches(name, column, encoding)]
        joined = {key: [value for part in rows for value in part[key]] for key in _FEATURES}
        texts, fingerprint = joined["text"], ""
        splits, hashes = np.array(joined["split"], dtype=object), np.array(joined["hash"], dtype=np.int64)
    else:
        fingerprint = hash_source(name, f"{_FORMAT} {column} {encoding}")
        texts = write_once(f"texts-{fingerprint[:32]}", _FEATURES, lambda: _batches(name, column, encoding))
        splits = texts.data.column("split").to_numpy()
        hashes = texts.data.column("hash").to_numpy()
    if not len(hashes):
        raise ValueError(f"data: {name} is empty; it holds no text")
    return Documents(name, texts, splits, hashes.view(np.uint64), fingerprint)


def _batches(name: str, column: str | None, encoding: str) -> Iterator[dict[str, list[Any]]]:
    columns: dict[str, list[Any]] = {key: [] for key in _FEATURES}
    size = 0
    for row in read_rows(name, "all", column=column, encoding=encoding):
        text = row["text"]
        if not text.strip():
            continue
        content = text.encode()
        columns["text"].append(text)
        columns["split"].append(str(row.get("split") or ""))
        columns["hash"].append(int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True))
        columns["num_bytes"].append(len(content))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield columns
            columns, size = {key: [] for key in _FEATURES}, 0
    if columns["text"]:
        yield columns


def _source_files(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        return sorted(one for one in path.rglob("*") if one.is_file())
    return [file for file, _ in data_files(path, TEXT_SUFFIXES | TABLE_SUFFIXES)]


def _size(name: str) -> int:
    """About how many bytes of text a source holds, as far as its files tell; what is streamed counts as large."""
    if name in EMBEDDED or not Path(name).exists():
        return 0 if name in EMBEDDED or not is_hub_id(name) else LEAST_MAPPED_BYTES
    packed = (*COMPRESSED_SUFFIXES, ".parquet")
    return sum(file.stat().st_size * (_PACKED if file.suffix in packed else 1) for file in _source_files(name))


def hash_source(name: str, how: str) -> str:
    """Return the SHA-256 of a source's content: the bytes and names of its files, or the revision of a Hub id.

    Args:
        name: As for `read_documents`.
        how: What else decides how it is read.
    """
    digest = hashlib.sha256(f"{how}\n".encode())
    if not Path(name).exists():
        # Without network `datasets` has it, or nobody.
        revision = hub_revision(name) or [
            rows._fingerprint for rows in load_hub_data(name, "a file or folder").values()
        ]
        digest.update(f"{name} {revision}".encode())
        return digest.hexdigest()
    for path in _source_files(name):
        with open(path, "rb") as file:
            where = path.relative_to(name) if path != Path(name) else path.suffix
            digest.update(f"{where} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
