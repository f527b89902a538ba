"""Applies a function to batches in several processes, in order and with a bounded number of them under way.

Results come in the order of the batches, so that the number of processes changes nothing.
"""

import collections
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def map_in_order(
    function: Callable[[ItemT], ResultT], items: Iterable[ItemT], workers: int, start: Callable[..., None], *given: Any
) -> Iterator[ResultT]:
    """Yield the function's results in the order of the items.

    Args:
        function: Of a module, so that another process finds it.
        items: Read only as far as there is work for the processes.
        workers: Processes; with 1 all is done in this one.
        start: Called once in each process.
        given: Its arguments.
    """
    if workers == 1:
        start(*given)
        yield from map(function, items)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(os.getpid(), start, given))
    waiting: collections.deque[Future[ResultT]] = collections.deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(parent: int, start: Callable[..., None], given: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent ends its processes in order.
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    start(*given)


def _end_with(parent: int) -> None:
    """End this process once its parent is gone, also one that was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
