"""What requests leave behind for drift: counts only, no text, in files that `deepseek-moe monitor drift` reads.

A file holds some hundreds of requests. Per request: when, how many tokens were read and written, whether the limit cut
the answer, the mean log-probability of what was written, tokens by bin, and tokens by expert of each layer. For naming
what moved, token ids are counted over a whole file, never per request.

Axes: N requests, L layers, E experts.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

NUM_BINS = 1024
# Knuth's multiplicative hash: neighboring ids fall into bins far apart.
_HASH = 2654435761


def bin_of(token_ids: np.ndarray) -> np.ndarray:
    """Return each token's bin, 0 to 1023; ids below 1024 have a bin each.

    Args:
        token_ids: Any shape.
    """
    ids = np.asarray(token_ids, np.int64)
    return np.where(ids < NUM_BINS, ids, (ids * _HASH % 2**32) >> 22)


@dataclass
class RequestTable:
    """Requests of one model.

    Attributes:
        model_hash: Of the weights.
        layers: Names of the layers.
        sizes: E of each.
        ended_at: `[N]`, Unix time.
        prompt_tokens: `[N]`.
        written_tokens: `[N]`.
        is_cut: `[N]` bool, whether the answer ended at its limit.
        log_prob: `[N]`, mean over the written tokens.
        token_bins: `[N, 1024]`, tokens of prompt and answer.
        expert_tokens: `[N, sum of E]`.
        token_ids: Distinct ids of all requests.
        token_counts: How often each came.
    """

    model_hash: str
    layers: list[str]
    sizes: list[int]
    ended_at: np.ndarray
    prompt_tokens: np.ndarray
    written_tokens: np.ndarray
    is_cut: np.ndarray
    log_prob: np.ndarray
    token_bins: np.ndarray
    expert_tokens: np.ndarray
    token_ids: np.ndarray
    token_counts: np.ndarray

    def __len__(self) -> int:
        """N."""
        return len(self.ended_at)

    def take(self, rows: np.ndarray) -> "RequestTable":
        """Return some of the requests; ids are counted over all.

        Args:
            rows: Places or a mask.
        """
        names = ("ended_at", "prompt_tokens", "written_tokens", "is_cut", "log_prob", "token_bins", "expert_tokens")
        return RequestTable(**{**vars(self), **{name: getattr(self, name)[rows] for name in names}})

    def save(self, path: Path) -> None:
        """Write a file; it is complete or not there.

        Args:
            path: Ends in `.npz`.
        """
        unfinished = path.with_suffix(".part")
        with open(unfinished, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **vars(self))
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> "RequestTable":
        """Read a file.

        Args:
            path: From `save`.

        Raises:
            ValueError: It is another kind of file.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {field.name: file[field.name] for field in fields(cls)}
        except (KeyError, ValueError, OSError, EOFError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ValueError(f"{path}: got {error}, expected a file of deepseek-moe's request counts") from None
        found["model_hash"] = str(found["model_hash"])
        found["layers"] = [str(name) for name in found["layers"]]
        found["sizes"] = [int(size) for size in found["sizes"]]
        return cls(**found)


def join(tables: Sequence[RequestTable]) -> RequestTable:
    """Return all requests of several tables.

    Args:
        tables: Of one model, at least one.

    Raises:
        ValueError: They are of several models.
    """
    if len({table.model_hash for table in tables}) > 1:
        raise ValueError("requests: got counts of several models in one folder, expected those of one")
    counts: Counter[int] = Counter()
    for table in tables:
        counts.update(dict(zip(table.token_ids.tolist(), table.token_counts.tolist(), strict=True)))
    names = ("ended_at", "prompt_tokens", "written_tokens", "is_cut", "log_prob", "token_bins", "expert_tokens")
    return RequestTable(
        model_hash=tables[0].model_hash,
        layers=tables[0].layers,
        sizes=tables[0].sizes,
        token_ids=np.array(list(counts.keys()), np.int64),
        token_counts=np.array(list(counts.values()), np.int64),
        **{name: np.concatenate([getattr(table, name) for table in tables]) for name in names},
    )


def load_requests(folder: Path, since: float, until: float) -> RequestTable | None:
    """Return the requests that ended within a time; None if there are none.

    Args:
        folder: Where `RequestLog` writes.
        since: Unix time.
        until: Likewise; not included.
    """
    # A file is written after its last request ended.
    paths = [path for path in sorted(folder.glob("requests-*.npz")) if path.stat().st_mtime >= since]
    tables = [RequestTable.load(path) for path in paths]
    tables = [table for table in tables if ((table.ended_at >= since) & (table.ended_at < until)).any()]
    if not tables:
        return None
    table = join(tables)
    return table.take((table.ended_at >= since) & (table.ended_at < until))


@dataclass(frozen=True)
class FinishedRequest:
    """One request whose last token was sent.

    Attributes:
        token_ids: Of prompt and answer.
        num_written: Those of the answer.
        is_cut: Whether the answer ended at its limit.
        log_prob: Mean over the answer.
        expert_tokens: `[sum of E]`.
        ended_at: Unix time.
    """

    token_ids: np.ndarray
    num_written: int
    is_cut: bool
    log_prob: float
    expert_tokens: np.ndarray
    ended_at: float


def make_table(
    requests: Sequence[FinishedRequest], model_hash: str, layers: list[str], sizes: list[int]
) -> RequestTable:
    """Return requests as a table; here their tokens become counts.

    Args:
        requests: At least one.
        model_hash: Of the weights.
        layers: Names of the layers.
        sizes: E of each.
    """
    bins = [np.bincount(bin_of(one.token_ids), minlength=NUM_BINS) for one in requests]
    ids, counts = np.unique(np.concatenate([one.token_ids for one in requests]), return_counts=True)
    return RequestTable(
        model_hash=model_hash,
        layers=layers,
        sizes=sizes,
        ended_at=np.array([one.ended_at for one in requests]),
        prompt_tokens=np.array([len(one.token_ids) - one.num_written for one in requests], np.int32),
        written_tokens=np.array([one.num_written for one in requests], np.int32),
        is_cut=np.array([one.is_cut for one in requests]),
        log_prob=np.array([one.log_prob for one in requests]),
        token_bins=np.array(bins, np.int32),
        expert_tokens=np.array([one.expert_tokens for one in requests], np.int32),
        token_ids=ids,
        token_counts=counts,
    )
