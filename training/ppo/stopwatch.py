"""Adds up how the time of a PPO step is spent; `player.py` and `trainer.py` use it."""

import contextlib
import time
from collections.abc import Iterator


class Stopwatch:
    """Adds up the seconds spent in each part of a step.

    Attributes:
        seconds: By part: generation, reward, logps (reference and values), update.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("generation", "reward", "logps", "update"), 0.0)

    @contextlib.contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count what runs inside as a part's time.

        Args:
            name: The part.
        """
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start
