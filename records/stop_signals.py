"""What Ctrl-C and SIGTERM do: the first ends the work in order, the second ends the process at once.

`stop_signals` turns both into `Interrupted`, a KeyboardInterrupt that knows its signal. Inside `deferred` the signal
is only noted: a training finishes its step and saves before it stops, for half a step cannot be gone on from.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# torchrun passes on the Ctrl-C that the terminal has already sent to each process.
_SAME_SIGNAL_S = 2.0


class Interrupted(KeyboardInterrupt):
    """The work was stopped by a signal.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell calls the end by this signal: 130 or 143."""
        return 128 + self.number


class StopSignals:
    """The state of the handlers; `stop_signals` makes and installs it.

    Attributes:
        number: The signal that came; None while none did.
        is_deferred: Whether a signal is noted only.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.is_deferred = False
        self._since = 0.0
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise what was noted.

        Raises:
            Interrupted: A signal came.
        """
        if self.number is not None:
            raise Interrupted(self.number)

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal, as `signal.signal` calls it."""
        if os.getpid() != self._pid:  # A forked child ends as it would without us.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        has_siblings = int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self.number is not None and not (has_siblings and time.monotonic() - self._since < _SAME_SIGNAL_S):
            os._exit(128 + number)
        if self.number is None:
            self.number, self._since = number, time.monotonic()
        if not self.is_deferred:
            raise Interrupted(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step; a second signal ends at once\n")


_current: StopSignals | None = None


@contextlib.contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Handle SIGINT and SIGTERM inside; within another such block that one goes on.

    A signal that the process was started to ignore stays ignored. Outside the main thread nothing is installed.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield _current or StopSignals()
        return
    stop = _current = StopSignals()
    kept = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in kept.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop.receive)
    try:
        yield stop
    finally:
        _current = None
        for number, handler in kept.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


@contextlib.contextmanager
def deferred() -> Iterator[StopSignals]:
    """Note a signal inside instead of raising; the caller asks for it by `StopSignals.check`."""
    with _deferring(True) as stop:
        yield stop


@contextlib.contextmanager
def undeferred() -> Iterator[None]:
    """Inside `deferred`, raise at once again, also what was noted before: nothing inside needs to be finished.

    Of several processes none may leave alone, so that there nothing changes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    with _deferring(False) as stop:
        stop.check()
        yield


@contextlib.contextmanager
def _deferring(value: bool) -> Iterator[StopSignals]:
    stop = _current or StopSignals()
    kept, stop.is_deferred = stop.is_deferred, value
    try:
        yield stop
    finally:
        stop.is_deferred = kept


def how_to_go_on(error: BaseException) -> str:
    """Return what an interrupted command tells: the error's own words, else what holds for every command."""
    said = str(error) if error.args and isinstance(error, KeyboardInterrupt) else ""
    return said or "nothing half-written counts as finished; run the same command again to go on"


def close_standard_output() -> None:
    """Send what is still to be printed to nowhere, after the reader of a pipe has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
