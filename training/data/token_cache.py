"""Tokens of large data sets, kept in the cache of `datasets` so that a second run does not tokenize again.

The file's name is a hash of the texts and of the tokenizer, so nothing else can be read back. `encode_documents` calls
it. Tokens of texts that are read from disk stay there, too (`StoredTokens`). ``HF_DATASETS_CACHE`` moves the cache,
``datasets.disable_caching()`` turns it off.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow
import pyarrow.ipc
from tqdm.auto import tqdm

from deepseek_records.document_tokens import mark_documents
from deepseek_records.hashes import hash_rows, hash_texts, hash_tokenizer
from deepseek_records.user_text import encode_documents_plainly
from deepseek_training.data.arrow_cache import write_once
from deepseek_training.data.mapped_texts import MappedTexts

logger = logging.getLogger(__name__)
_LEAST_CHARACTERS = 1_000_000  # below that tokenizing takes less than a second
_BATCH_CHARACTERS = 200_000
_FEATURES = datasets.Features({"ids": datasets.List(datasets.Value("int32"))})


def encode_cached(texts: Sequence[str], tokenizer: Any) -> Sequence[Sequence[int]]:
    """Return each text's ids, without begin and end tokens, from the cache where it has them; else with a bar.

    Args:
        texts: Documents.
        tokenizer: A `transformers` tokenizer.
    """
    length = sum(map(len, texts))
    if length < _LEAST_CHARACTERS or not datasets.is_caching_enabled():
        return encode_documents_plainly(texts, tokenizer)
    fingerprint = hash_rows([hash_texts(texts), hash_tokenizer(tokenizer)])[:32]
    path = Path(datasets.config.HF_DATASETS_CACHE) / "deepseek-moe" / f"tokens-{fingerprint}.arrow"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_dict({"text": list(texts)}).map(
            lambda part: {"ids": encode_documents_plainly(part["text"], tokenizer)},
            batched=True,
            batch_size=max(1, _BATCH_CHARACTERS * len(texts) // length),
            remove_columns=["text"],
            features=_FEATURES,
            cache_file_name=str(path),
            new_fingerprint=fingerprint,
            desc="tokenizing",
        )
    except OSError as error:
        logger.warning("tokens are not cached in %s (%s)", path.parent, error.strerror)
        return encode_documents_plainly(texts, tokenizer)
    return rows.with_format("numpy")[:]["ids"]


class StoredTokens(Sequence[np.ndarray]):
    """Tokens of documents in a file, of which only what is asked for is read.

    It is not mapped: pages that are mapped count as memory of the process until others need it.

    Args:
        path: An Arrow file with the column `ids`.
        fingerprint: Tells its content.

    Attributes:
        lengths: Tokens of each document, int64.
    """

    def __init__(self, path: str, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._file: int | None = None
        lengths, places = [], []
        with pyarrow.memory_map(path) as file:
            whole = file.read_buffer()
            for batch in pyarrow.ipc.open_stream(whole):
                ids = batch.column("ids")
                offsets = ids.offsets.to_numpy().astype(np.int64)
                lengths.append(np.diff(offsets))
                places.append(ids.values.buffers()[1].address - whole.address + 4 * (ids.values.offset + offsets[:-1]))
        self.lengths = np.concatenate(lengths)
        self._places = np.concatenate(places)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...

    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        return self.read(index, 0, int(self.lengths[index]))

    def read(self, index: int, begin: int, end: int) -> np.ndarray:
        """Return some tokens of a document.

        Args:
            index: Which document.
            begin: The first token.
            end: One past the last; at most the document's length counts.
        """
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        size = 4 * (min(end, int(self.lengths[index])) - begin)
        return np.frombuffer(os.pread(self._file, size, int(self._places[index]) + 4 * begin), dtype=np.int32)

    def __getstate__(self) -> dict[str, Any]:
        """A process that loads batches opens the file itself."""
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


def encode_mapped(texts: MappedTexts, tokenizer: Any) -> StoredTokens:
    """Return each text's tokens between begin and end tokens, from the cache; where it has none, they are made first.

    Args:
        texts: Documents.
        tokenizer: A `transformers` tokenizer.

    Raises:
        OSError: The cache cannot be written.
    """
    fingerprint = hash_rows([texts.fingerprint, hash_tokenizer(tokenizer)])[:32]

    def batches() -> Iterator[dict[str, list[Any]]]:
        mark_documents([], tokenizer)
        with tqdm(
            desc="tokenizing",
            total=texts.num_bytes,
            unit="B",
            unit_scale=True,
            file=sys.stderr,
            disable=None if os.isatty(2) else True,
        ) as bar:
            for batch in texts.batches():
                yield {"ids": mark_documents(encode_documents_plainly(batch, tokenizer), tokenizer)}
                bar.update(sum(len(text.encode()) for text in batch))

    rows = write_once(f"tokens-{fingerprint}", _FEATURES, batches)
    return StoredTokens(rows.cache_files[0]["filename"], fingerprint)
