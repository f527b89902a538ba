"""Writes what requests leave behind, while the server runs."""

import os
import queue
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deepseek_records.hashes import hash_model
from deepseek_serving.monitoring.request_counts import FinishedRequest, make_table
from deepseek_serving.monitoring.routing_counts import RequestCounts

if TYPE_CHECKING:
    from deepseek_serving.openai_endpoint.engine import Engine

_PER_FILE = 256
_MAX_WAIT_S = 60.0


class RequestLog:
    """Writes requests to a folder, in a thread of its own.

    Args:
        folder: Is made if need be.
        model_hash: Of the weights.
        layers: Names of the layers.
        sizes: E of each.
    """

    def __init__(self, folder: Path, model_hash: str, layers: list[str], sizes: list[int]) -> None:
        self.folder = folder
        self.model_hash, self.layers, self.sizes = model_hash, layers, sizes
        folder.mkdir(parents=True, exist_ok=True)
        self._queue: queue.Queue[FinishedRequest | None] = queue.Queue()
        self._number = 0
        self._thread = threading.Thread(target=self._write_all, daemon=True)
        self._thread.start()

    def add(self, request: FinishedRequest) -> None:
        """Have a request written, within a minute.

        Args:
            request: Finished.
        """
        self._queue.put(request)

    def close(self) -> None:
        """Write what is left."""
        self._queue.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        waiting: list[FinishedRequest] = []
        write_at = 0.0
        is_open = True
        while is_open:
            try:
                request = self._queue.get(timeout=max(0.05, write_at - time.monotonic()) if waiting else None)
            except queue.Empty:
                pass
            else:
                is_open = request is not None
                if request is not None:
                    write_at = write_at if waiting else time.monotonic() + _MAX_WAIT_S
                    waiting.append(request)
            if waiting and (not is_open or len(waiting) >= _PER_FILE or time.monotonic() >= write_at):
                self._write(waiting)
                waiting = []

    def _write(self, requests: list[FinishedRequest]) -> None:
        self._number += 1
        name = f"requests-{time.time_ns() // 1_000_000}-{os.getpid()}-{self._number}.npz"
        make_table(requests, self.model_hash, self.layers, self.sizes).save(self.folder / name)


def open_log(folder: Path, engine: "Engine") -> RequestLog:
    """Return a log for what an engine answers.

    Args:
        folder: Is made if need be.
        engine: Started, with counts.
    """
    assert engine.routing is not None
    engine.keep_log_probs()
    return RequestLog(folder, hash_model(engine.model), engine.routing.names, engine.routing.sizes)


def log_request(log: RequestLog, token_ids: np.ndarray, num_written: int, is_cut: bool, counts: RequestCounts) -> None:
    """Add a request to a log.

    Args:
        log: The log.
        token_ids: Of prompt and answer.
        num_written: Those of the answer.
        is_cut: Whether the answer ended at its limit.
        counts: What the routers chose for it.
    """
    log_prob = counts.log_prob / max(1, counts.num_written)
    log.add(FinishedRequest(token_ids, num_written, is_cut, log_prob, counts.expert_tokens, time.time()))
