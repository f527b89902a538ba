"""A teacher's distributions on disk: the k likeliest tokens of each position and the rest as one, block by block.

`distill` fills a cache once and reads it in every later run; the teacher need not be in memory while a student trains.
A cache is a folder::

    cache.json     of what and how it was made, and how many blocks are whole; written last, by an atomic rename
    keys.bin       a hash of each block's tokens
    ids.bin        `[blocks, S - 1, K]` uint16, or int32 from 65,537 tokens of vocabulary on
    log_probs.bin  `[blocks, S - 1, K + 1]` fp16, the last that of all other tokens

Rows are found by block, never by training step, so that batch size, order, workers and processes do not matter. Blocks
are added at the end: an interrupted write goes on behind the last whole block, and a longer run adds what it needs.

Axes: S tokens of a block, K kept tokens.
"""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from deepseek_records.json_files import read_object
from deepseek_records.run_folder import write_json
from deepseek_records.run_lock import lock_run, unlock_run
from deepseek_training.compress.distill_loss import TopK, shorten

CACHE_FILE = "cache.json"
_FORMAT = 1
_KEY_BYTES = 16
_SHORT_IDS = 65_536
_BLOCKS_BETWEEN_MARKS = 64


@dataclasses.dataclass(frozen=True)
class CacheIdentity:
    """What a cache's rows depend on besides the blocks.

    Attributes:
        teacher: Hash of the weights.
        tokenizer: Hash of the tokenizer.
        top_k: K.
        temperature: Of the softmax.
        bf16: Whether the teacher computed under bf16 autocast.
        vocab_size: Tokens that the teacher predicts.
        sequence_length: S.
    """

    teacher: str
    tokenizer: str
    top_k: int
    temperature: float
    bf16: bool
    vocab_size: int
    sequence_length: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk of one position."""
        return self.top_k * self.id_type.itemsize + (self.top_k + 1) * 2

    @property
    def id_type(self) -> np.dtype[Any]:
        """How token ids are stored."""
        return np.dtype(np.uint16 if self.vocab_size <= _SHORT_IDS else np.int32)

    def shape(self, num_blocks: int) -> tuple[int, int, int]:
        """Shape of the ids of that many blocks."""
        return num_blocks, self.sequence_length - 1, self.top_k


class TeacherCache:
    """Reads a teacher's distributions of some blocks; made by `fill_cache` or, of a whole one, by `open_cache`.

    Args:
        folder: The cache.
        identity: What it was made of.
        num_blocks: How many of its blocks are whole.
    """

    def __init__(self, folder: Path, identity: CacheIdentity, num_blocks: int) -> None:
        self.folder, self.identity, self.num_blocks = folder, identity, num_blocks
        shape = identity.shape(num_blocks)
        self._ids: np.ndarray = np.memmap(folder / "ids.bin", dtype=identity.id_type, mode="r", shape=shape)
        wide = (*shape[:2], shape[2] + 1)
        self._log_probs: np.ndarray = np.memmap(folder / "log_probs.bin", dtype=np.float16, mode="r", shape=wide)

    def read(self, block: int) -> TopK:
        """Return the distributions of one block, `[S - 1, ...]`.

        Args:
            block: Its number among the blocks that the cache was opened for.
        """
        ids = torch.from_numpy(np.array(self._ids[block]).astype(np.int64))
        return TopK(torch.from_numpy(np.array(self._log_probs[block])), ids)


def fill_cache(
    folder: str | Path,
    identity: CacheIdentity,
    blocks: torch.Tensor,
    teacher: Any,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> TeacherCache:
    """Return the cache of some blocks, after the teacher has added those that are missing.

    Args:
        folder: The cache; made where there is none.
        identity: What it must have been made of.
        blocks: `[blocks, S]`, which begin like those it holds, or the other way about.
        teacher: The model, in evaluation mode.
        batch_size: Blocks a forward pass.
        device: Where the teacher is.

    Raises:
        FileExistsError: The folder holds something else, or another process writes it.
        ValueError: The cache is of other blocks, of another teacher, tokenizer or k, or damaged.
    """
    folder = Path(folder)
    keys = block_keys(blocks)
    done = check_cache(folder, identity, keys)
    if done < len(blocks):
        folder.mkdir(parents=True, exist_ok=True)
        lock_run(folder)
        try:
            done = check_cache(folder, identity, keys)
            rows = _teach(teacher, blocks[done:], identity, batch_size, device)
            bar = tqdm(rows, total=len(blocks), initial=done, desc="teacher's cache", unit="block", mininterval=0.5)
            _append(folder, identity, keys, done, bar)
        finally:
            unlock_run(folder)
    return TeacherCache(folder, identity, len(blocks))


def check_cache(folder: str | Path, identity: CacheIdentity, keys: np.ndarray) -> int:
    """Return how many of some blocks a cache holds whole; 0 where there is none yet.

    Args:
        folder: The cache.
        identity: What it must have been made of.
        keys: From `block_keys`.

    Raises:
        FileExistsError: The folder holds something else.
        ValueError: The cache is of other blocks, of another teacher, tokenizer or k, or damaged.
    """
    folder = Path(folder)
    if not (folder / CACHE_FILE).is_file():
        # What a write that was cut off before its first mark leaves is written again.
        own = {*_sizes(identity), ".lock", CACHE_FILE + ".partial"}
        others = sorted({path.name for path in folder.iterdir()} - own) if folder.is_dir() else []
        if others or (folder.exists() and not folder.is_dir()):
            raise FileExistsError(f"cache: {folder} holds no cache of ours; pass another --cache")
        return 0
    made = read_object(folder / CACHE_FILE, "cache")
    _check_identity(folder, identity, made)
    num_blocks = made["num_blocks"]
    for name, size in _sizes(identity).items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else 0
        if found < size * num_blocks:
            raise ValueError(
                f"cache: {folder / name} is cut short, got {found} bytes, expected {size * num_blocks}; delete the "
                "cache, or pass another --cache"
            )
    common = min(num_blocks, len(keys))
    held = np.fromfile(folder / "keys.bin", dtype=np.uint8, count=common * _KEY_BYTES).reshape(common, _KEY_BYTES)
    if not np.array_equal(held, keys[:common]):
        raise ValueError(
            f"cache: {folder} was made of other data (block {int((held != keys[:common]).any(1).argmax())} differs); "
            "bring it back, or pass another --cache"
        )
    return common


def block_keys(blocks: torch.Tensor) -> np.ndarray:
    """Return a hash of each block's tokens, `[blocks, 16]` bytes.

    Args:
        blocks: `[blocks, S]`.
    """
    rows = np.ascontiguousarray(blocks.numpy().astype(np.int64))
    digests = (hashlib.sha256(row.tobytes()).digest()[:_KEY_BYTES] for row in rows)
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _KEY_BYTES)


def _check_identity(folder: Path, identity: CacheIdentity, made: dict[str, Any]) -> None:
    expected = {"format": _FORMAT, **dataclasses.asdict(identity)}
    for name, value in expected.items():
        found = made.get(name)
        if found != value:
            short = [str(one)[:12] for one in (found, value)]
            raise ValueError(
                f"cache: {folder} was made with another {name} ({short[0]} then, {short[1]} now); pass another --cache"
            )
    if not isinstance(made.get("num_blocks"), int) or made["num_blocks"] < 0:
        raise ValueError(f"cache: {folder / CACHE_FILE}: num_blocks: got {made.get('num_blocks')!r}, expected a count")


def _sizes(identity: CacheIdentity) -> dict[str, int]:
    """Bytes of one block in each file."""
    _, length, top_k = identity.shape(1)
    return {
        "keys.bin": _KEY_BYTES,
        "ids.bin": length * top_k * identity.id_type.itemsize,
        "log_probs.bin": length * (top_k + 1) * 2,
    }


@torch.no_grad()
def _teach(
    teacher: Any, blocks: torch.Tensor, identity: CacheIdentity, batch_size: int, device: torch.device | str
) -> Iterator[TopK]:
    """The teacher's distributions of each block in turn."""
    kind = torch.device(device).type
    for start in range(0, len(blocks), batch_size):
        batch = blocks[start : start + batch_size].long().to(device)
        with torch.autocast(kind, torch.bfloat16, enabled=identity.bf16):
            logits = teacher(input_ids=batch, use_cache=False).logits[:, :-1]
        short = shorten(logits, identity.top_k, identity.temperature)
        yield from (TopK(*row) for row in zip(short.log_probs.cpu(), short.ids.cpu(), strict=True))


def _append(folder: Path, identity: CacheIdentity, keys: np.ndarray, done: int, rows: Iterator[TopK]) -> None:
    """Write blocks behind the whole ones, and mark them as whole every now and then and at the end."""
    sizes = _sizes(identity)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "ab")) for name in sizes}
        for name, file in files.items():
            file.truncate(done * sizes[name])
        for number, row in enumerate(rows, start=done):
            files["keys.bin"].write(keys[number].tobytes())
            files["ids.bin"].write(row.ids.numpy().astype(identity.id_type).tobytes())
            files["log_probs.bin"].write(row.log_probs.clamp(min=-60_000).to(torch.float16).numpy().tobytes())
            if (number + 1) % _BLOCKS_BETWEEN_MARKS == 0 or number + 1 == len(keys):
                _mark(folder, identity, list(files.values()), number + 1)


def _mark(folder: Path, identity: CacheIdentity, files: Sequence[Any], num_blocks: int) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / CACHE_FILE, {"format": _FORMAT, **dataclasses.asdict(identity), "num_blocks": num_blocks})
