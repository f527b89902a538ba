"""Runs model-written programs so that they can neither lie about their outcome nor do harm.

    run_tests([("def add(a, b): return a + b", "assert add(2, 3) == 5")])   # two processes for each
    run_program("assert 1 + 1 == 2").passed      # one program; True only if it ran to its end without error
    for result in run_programs(sources): ...     # several at once, results in order

Called by the pass@k metric and usable alone. Each program runs in its own process without network, environment or
files but Python's own library and an empty temporary folder, under limits, by the strongest means the machine has;
what these are is probed when the first program runs and named by `describe_protection`. ``server.py`` holds
the mechanism.

On a machine that offers less than `MINIMUM`, nothing runs unless asked for with ``allow_weak_sandbox``.
"""

import atexit
import json
import math
import os
import queue
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from deepseek_eval.sandbox.plan import plan_tests

# Each needs at least one means: who the program talks to, what it reads and writes, whom it signals, how much it
# takes, and a proof that it ended by itself.
MINIMUM = ("network", "files", "processes", "limits", "end")
DEFAULT_TIMEOUT_S = 3.0
_SERVER = Path(__file__).resolve().parent / "server.py"
_START_LIMIT_S = 60.0
_GRACE_S = 30.0


@dataclass(frozen=True)
class ProgramResult:
    """How one program ended.

    Args:
        passed: True only if it ran to its end without error.
        reason: ``passed``, ``failed: <exception>``, ``timed out``, or how it died or cheated.
        seconds: Wall time, start of its process included.
        isolation: ``separate`` if the tests ran in a process that the candidate has no part in, ``shared`` if all was
            one program.
    """

    passed: bool
    reason: str
    seconds: float
    isolation: str = "shared"


def run_program(
    source_code: str,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    *,
    as_main: bool = False,
    allow_weak_sandbox: bool = False,
) -> ProgramResult:
    """Run one program.

    What the verdict can be trusted for: a program that raised, exited, crashed or ran out of time is never called
    passed by accident, and honest programs are judged as they end. What it cannot: the program shares the interpreter
    with the lines that are meant to test it, so one written to deceive can skip or rewrite them (for example by
    searching the interpreter's objects) and still reach its end. Where candidate and tests come from different hands,
    use `run_tests`.

    Args:
        source_code: Python source.
        timeout_s: Wall time it may take.
        as_main: Run it with ``__name__ == "__main__"``; off, as in the references, where such a block is skipped.
        allow_weak_sandbox: Run even where the machine offers less than `MINIMUM`.

    Raises:
        ValueError: The machine offers less than the minimum, or the timeout is not positive.
    """
    sources = [source_code]
    return next(
        run_programs(
            sources, timeout_s=timeout_s, num_workers=1, as_main=as_main, allow_weak_sandbox=allow_weak_sandbox
        )
    )


def run_programs(
    sources: Iterable[str],
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    num_workers: int | None = None,
    as_main: bool = False,
    allow_weak_sandbox: bool = False,
) -> Iterator[ProgramResult]:
    """Run programs side by side and yield their results in order; for what the verdicts are worth see `run_program`.

    Args:
        sources: Python sources; read only a little ahead of the results.
        timeout_s: Wall time each may take.
        num_workers: Programs at once; None takes one a processor.
        as_main: As for `run_program`.
        allow_weak_sandbox: As for `run_program`.

    Raises:
        ValueError: The machine offers less than the minimum, or a setting is not positive.
    """
    settings = {"timeout_s": float(timeout_s), "as_main": as_main}
    requests = ({"source": source, **settings} for source in sources)
    return _run_all(requests, _POOL.run, timeout_s, num_workers, allow_weak_sandbox)


def run_tests(
    candidates: Iterable[tuple[str, str]],
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    num_workers: int | None = None,
    allow_weak_sandbox: bool = False,
) -> Iterator[ProgramResult]:
    """Run tests on candidates side by side and yield their results in order.

    The tests run in one process and the candidate in another; arguments and results cross as exact builtin values, so
    nothing that a candidate does to its own interpreter reaches the verdict. Tests for which that is impossible
    (`ProgramResult.isolation` is then ``shared``) run behind the candidate in one program, as by `run_program`.

    Args:
        candidates: Pairs of a candidate's source and the source that tests it; read only a little ahead.
        timeout_s: Wall time each may take.
        num_workers: Programs at once; None takes one for each processor.
        allow_weak_sandbox: As for `run_program`.

    Raises:
        ValueError: The machine offers less than the minimum, or a setting is not positive.
    """
    requests = (
        {"candidate": candidate, "tests": tests, "timeout_s": float(timeout_s)} for candidate, tests in candidates
    )
    return _run_all(requests, _run_apart, timeout_s, num_workers, allow_weak_sandbox)


def _run_apart(request: dict) -> ProgramResult:
    plan = plan_tests(request["tests"])
    if plan.shared_because is None:
        result = _POOL.run({**request, "names": plan.names, "imports": plan.imports})
        # Only what the tests themselves pass can be uncrossable, so no candidate chooses this.
        if not result.reason.startswith("uncrossable"):
            return result
    source = f"{request['candidate']}\n{request['tests']}"
    return _POOL.run({"source": source, "timeout_s": request["timeout_s"]})


def _run_all(
    requests: Iterable[dict],
    run: Callable[[dict], ProgramResult],
    timeout_s: float,
    num_workers: int | None,
    allow_weak_sandbox: bool,
) -> Iterator[ProgramResult]:
    num_workers = num_workers if num_workers is not None else len(os.sched_getaffinity(0))
    if num_workers < 1:
        raise ValueError(f"num_workers: got {num_workers}, expected 1 or more")
    if not 0 < timeout_s < math.inf:
        raise ValueError(f"timeout_s: got {timeout_s}, expected a finite number of seconds above 0")
    _check_protection(allow_weak_sandbox)
    return _run_ahead(requests, run, num_workers)


def _run_ahead(
    requests: Iterable[dict], run: Callable[[dict], ProgramResult], num_workers: int
) -> Iterator[ProgramResult]:
    with ThreadPoolExecutor(num_workers) as executor:
        pending: deque = deque()
        for request in requests:
            pending.append(executor.submit(run, request))
            if len(pending) > 4 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def describe_protection() -> dict[str, str]:
    """Return what confines a program on this machine, by concern: network, files, processes, user, limits, end."""
    return dict(_POOL.layers())


def _check_protection(allow_weak: bool) -> None:
    layers = _POOL.layers()
    missing = [name for name in MINIMUM if name not in layers]
    if missing and not allow_weak:
        raise ValueError(
            f"sandbox: this machine offers no protection for {', '.join(missing)} "
            f"({'; '.join(_POOL.notes) or 'no reason given'}); "
            "pass allow_weak_sandbox (--allow-weak-sandbox) to run programs all the same"
        )


class ProgramServer:
    """One process that runs programs one after another.

    Args:
        without: Means not to use although the machine has them: ``namespaces``, ``landlock``, ``seccomp``. For tests.
    """

    def __init__(self, without: Iterable[str] = ()):
        self.folder = tempfile.mkdtemp(prefix="deepseek-sandbox-")
        self.socket, theirs = socket.socketpair()
        command = [
            sys.executable,
            "-I",
            "-S",
            "-B",
            str(_SERVER),
            str(theirs.fileno()),
            self.folder,
            ",".join(without),
        ]
        self.process = subprocess.Popen(
            command,
            env={},
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,
        )
        theirs.close()
        self.socket.settimeout(_START_LIMIT_S)
        hello = self._receive()
        if "error" in hello:
            self.close()
            raise ValueError(f"sandbox: its server did not start ({hello['error']})")
        self.layers: dict[str, str] = hello["layers"]
        self.notes: list[str] = hello["notes"]

    def run(self, request: dict) -> ProgramResult:
        """Run one program.

        Args:
            request: ``source``, ``timeout_s``, ``as_main``.
        """
        self.socket.settimeout(request["timeout_s"] + _GRACE_S)
        data = json.dumps(request).encode()
        self.socket.sendall(struct.pack("I", len(data)) + data)
        return ProgramResult(**self._receive())

    def _receive(self) -> dict:
        (size,) = struct.unpack("I", self._receive_exactly(4))
        return json.loads(self._receive_exactly(size))

    def _receive_exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.socket.recv(size - len(data))
            if not chunk:
                raise ConnectionError("the sandbox's server ended")
            data += chunk
        return data

    def close(self) -> None:
        """End the server and remove its folder."""
        self.socket.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Pool:
    """Idle servers, kept for the next call and ended with the process."""

    def __init__(self):
        self.idle: queue.SimpleQueue[ProgramServer] = queue.SimpleQueue()
        self.lock = threading.Lock()
        self.notes: list[str] = []
        self._layers: dict[str, str] | None = None
        self.owner = os.getpid()

    def layers(self) -> dict[str, str]:
        with self.lock:
            if self._layers is None:
                server = self._take()
                self._layers, self.notes = server.layers, server.notes
                self.idle.put(server)
            return self._layers

    def _take(self) -> ProgramServer:
        if self.owner != os.getpid():
            # A forked copy of this process must not talk over its parent's sockets.
            self.idle, self.owner = queue.SimpleQueue(), os.getpid()
        try:
            return self.idle.get_nowait()
        except queue.Empty:
            return ProgramServer()

    def run(self, request: dict) -> ProgramResult:
        server = self._take()
        try:
            result = server.run(request)
        except (OSError, ConnectionError) as error:
            server.process.kill()
            server.close()
            return ProgramResult(False, f"sandbox: {error}", 0.0)
        self.idle.put(server)
        return result

    def close(self) -> None:
        while self.owner == os.getpid():
            try:
                self.idle.get_nowait().close()
            except queue.Empty:
                return


_POOL = _Pool()
atexit.register(_POOL.close)
