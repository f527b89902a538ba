"""Starts one program, waits for its end, and decides whether that was one.

Called by ``server.py`` in a process forked for the one program. Standard library only. Nothing is believed
that the program's process sends; what counts is where the kernel says it stands (see ``server.py``).
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import time

import confinement as kernel
from program import CHANNEL, MAX_PROCESSES, MEMORY_BYTES, become_program, confine
from tester import run_tests

DISK_BYTES = 64 << 20
MAX_ENTRIES = 4096
MAX_FOLDER_DEPTH = 100
# What the kernel keeps for a socket at most (its default for sending); a filter keeps programs from raising it.
SOCKET_BYTES = 208 << 10
TICK_S = 0.02
# How long a process that says it has arrived may take to block in its read, threads and a loaded machine considered.
ARRIVAL_S = 2.0


def judge_and_exit(server, request: dict, writer: int) -> None:
    """In a forked child: run one program and write its outcome as JSON. Never returns.

    Args:
        server: The `Server` of ``server.py``.
        request: ``source``, ``timeout_s`` and ``as_main``.
        writer: The handle to write to.
    """
    try:
        outcome = _Judge(server, request).run()
    except BaseException as error:
        outcome = {"passed": False, "reason": f"sandbox: {type(error).__name__}: {error}"}
    os.write(writer, json.dumps(outcome).encode())
    os._exit(0)


class _Judge:
    """Starts one program, waits for its end, and decides."""

    def __init__(self, server, request: dict):
        self.server = server
        self.request = request
        self.init = 0

    def run(self) -> dict:
        server = self.server
        kernel.adopt_orphans()
        server.parent.close()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        if "tests" in self.request:
            # Before the namespace is made: the candidate cannot name a process outside.
            ours = self._fork_tester(ours, theirs)
        if server.layers.get("processes", "").startswith("process namespace"):
            kernel.unshare(kernel.CLONE_NEWPID)
            self.init = _fork_init()
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            become_program(server, self.request, theirs.detach())
        theirs.close()
        self.channel = ours
        try:
            return self._watch_tests() if "tests" in self.request else self._watch()
        finally:
            self._kill()

    def _fork_tester(self, channel: socket.socket, candidates: socket.socket) -> socket.socket:
        """Start the process of the tests, which gets the candidate's channel; return what it reports over."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid:
            theirs.close()
            channel.close()
            return ours
        try:
            candidates.close()
            kept = [channel.fileno(), theirs.fileno()]
            null = os.open("/dev/null", os.O_RDWR)
            for handle in (0, 1, 2):
                os.dup2(null, handle)
            for handle in range(3, max(*kept, null, self.server.proc, ours.fileno()) + 1):
                if handle not in kept:
                    with contextlib.suppress(OSError):
                        os.close(handle)
            confine(self.server, is_alone=False)
            run_tests(channel, kept[1], self.request)
        except BaseException as error:
            os.write(kept[1], f"broken sandbox: {type(error).__name__}: {error}".encode()[:200])
        os._exit(0)

    def _watch_tests(self) -> dict:
        """Wait for the tests' own word: their process is none of the candidate's."""
        self.deadline = time.monotonic() + 20.0
        while True:
            reason = self._find_excess()
            if time.monotonic() > self.deadline:
                reason = "timed out"
            if reason:
                break
            if not select.select([self.channel], [], [], TICK_S)[0]:
                continue
            word, _, text = self.channel.recv(2048).decode("utf-8", "replace").partition(" ")
            if word == "ready":
                self.deadline = time.monotonic() + self.request["timeout_s"]
                continue
            if word == "broken" and text == "ended":
                reason = self._explain_exit()
            else:
                texts = {"passed": "passed", "broken": text, "": "the process of the tests died"}
                reason = texts.get(word, f"{word}: {text}")
            break
        return {"passed": reason == "passed", "reason": reason, "isolation": "separate"}

    def _watch(self) -> dict:
        self.deadline = time.monotonic() + 20.0
        begin = self._await_stop()
        if isinstance(begin, str):
            return {"passed": False, "reason": f"sandbox: the program did not start ({begin})"}
        self.deadline = time.monotonic() + self.request["timeout_s"]
        self.channel.send(b"g")
        end = self._await_stop()
        if isinstance(end, str):
            return {"passed": False, "reason": end}
        if begin != end:
            return {"passed": False, "reason": "claimed its end from elsewhere than the end"}
        return {"passed": True, "reason": "passed"}

    def _await_stop(self) -> tuple | str:
        """Where the process blocks once it says so, or why it never did."""
        while True:
            if time.monotonic() > self.deadline:
                return "timed out"
            if select.select([self.channel], [], [], TICK_S)[0]:
                message = self.channel.recv(256)
                if not message:
                    return self._explain_exit()
                if message[:1] == b"E":
                    return "failed: " + message[1:].split(b"\n")[0].decode("utf-8", "replace")
                return self._read_stop()
            excess = self._find_excess()
            if excess:
                return excess

    def _read_stop(self) -> tuple | str:
        limit = min(time.monotonic() + ARRIVAL_S, self.deadline + 0.1)
        while time.monotonic() < limit:
            fields = self._read_proc("syscall").split()
            # Number, six arguments, stack pointer, program counter; "running" while it is on a processor. Of the
            # arguments the buffer's address may differ, the handle may not.
            if len(fields) == 9 and int(fields[1], 16) == CHANNEL:
                return (fields[0], fields[1], fields[7], fields[8])
            time.sleep(0.0002)
        return "claimed its end without being there"

    def _read_proc(self, name: str) -> str:
        try:
            handle = os.open(f"{self.pid}/{name}", os.O_RDONLY, dir_fd=self.server.proc)
        except OSError:
            return ""
        try:
            return os.read(handle, 4096).decode()
        except OSError:
            return ""
        finally:
            os.close(handle)

    def _explain_exit(self) -> str:
        """The channel is closed: either the process ended, or the program closed what it does not own."""
        until = min(time.monotonic() + 0.2, self.deadline)
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                if os.WIFSIGNALED(status):
                    return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
                return f"exited early with status {os.WEXITSTATUS(status)}"
            time.sleep(0.001)
        return "closed the judge's channel"

    def _find_excess(self) -> str | None:
        family = self._family(self.pid)
        if len(family) > 1:
            num_bytes = sum(self._resident_bytes(pid) + SOCKET_BYTES * self._count_sockets(pid) for pid in family)
            if num_bytes > MEMORY_BYTES:
                return "used too much memory"
        if self.server.scratch != "/tmp":
            return self._find_disk_excess(family)
        return None

    def _find_disk_excess(self, family: list[int]) -> str | None:
        """What a file system of its own would refuse: the scratch folder here is one of the host's."""
        num_bytes, num_entries, depth = measure_folder(self.server.scratch, MAX_ENTRIES, MAX_FOLDER_DEPTH)
        if num_entries > MAX_ENTRIES or depth > MAX_FOLDER_DEPTH:
            return "made too many files or folders too deep"
        unlinked: dict[tuple[int, int], int] = {}
        for pid in family:
            unlinked |= self._unlinked_files(pid)
        return "wrote too much" if num_bytes + sum(unlinked.values()) > DISK_BYTES else None

    def _unlinked_files(self, pid: int) -> dict[tuple[int, int], int]:
        """Size on disk of files that a process holds open, or mapped, and that have no name any more."""
        found: dict[tuple[int, int], int] = {}
        with contextlib.suppress(OSError):
            folder = os.open(f"{pid}/fd", os.O_RDONLY, dir_fd=self.server.proc)
            try:
                for name in os.listdir(folder):
                    with contextlib.suppress(OSError):
                        status = os.stat(name, dir_fd=folder)
                        if status.st_nlink == 0:
                            found[status.st_dev, status.st_ino] = status.st_blocks * 512
            finally:
                os.close(folder)
            with os.fdopen(os.open(f"{pid}/maps", os.O_RDONLY, dir_fd=self.server.proc)) as file:
                for line in file:
                    if line.endswith(" (deleted)\n") and self.server.scratch in line:
                        addresses, _, _, device, inode, *_ = line.split()
                        start, end = (int(part, 16) for part in addresses.split("-"))
                        major, minor = (int(part, 16) for part in device.split(":"))
                        found.setdefault((os.makedev(major, minor), int(inode)), end - start)
        return found

    def _family(self, pid: int) -> list[int]:
        """The process and all its descendants, as far as the kernel lists them."""
        found, queue = [], [pid]
        while queue and len(found) <= 4 * MAX_PROCESSES:
            current = queue.pop()
            found.append(current)
            try:
                tasks = os.open(f"{current}/task", os.O_RDONLY, dir_fd=self.server.proc)
            except OSError:
                continue
            try:
                for task in os.listdir(tasks):
                    with contextlib.suppress(OSError):
                        handle = os.open(f"{task}/children", os.O_RDONLY, dir_fd=tasks)
                        with os.fdopen(handle) as file:
                            queue += [int(child) for child in file.read().split()]
            finally:
                os.close(tasks)
        return found

    def _resident_bytes(self, pid: int) -> int:
        with contextlib.suppress(OSError, IndexError, ValueError):
            handle = os.open(f"{pid}/statm", os.O_RDONLY, dir_fd=self.server.proc)
            with os.fdopen(handle) as file:
                return int(file.read().split()[1]) * resource.getpagesize()
        return 0

    def _count_sockets(self, pid: int) -> int:
        with contextlib.suppress(OSError):
            folder = os.open(f"{pid}/fd", os.O_RDONLY, dir_fd=self.server.proc)
            try:
                return sum(_links_to_socket(name, folder) for name in os.listdir(folder))
            finally:
                os.close(folder)
        return 0

    def _kill(self) -> None:
        """End the program and all it started. In its own namespace, the init's end is theirs; else hunt them down."""
        for pid in (self.init, self.pid):
            if pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if self.pid and not self.init:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        while True:
            for pid in self._family(os.getpid())[1:]:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            try:
                os.waitpid(-1, 0)
            except ChildProcessError:
                return


def _fork_init() -> int:
    """The first process of the new process namespace: it idles, adopts orphans, and takes all along when killed.

    The program is the second one, because the first is immune to signals from inside, its own included.
    """
    pid = os.fork()
    if pid == 0:
        os.closerange(3, 1 << 16)
        kernel.die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            signal.pause()
    return pid


def _links_to_socket(name: str, folder: int) -> bool:
    try:
        return os.readlink(name, dir_fd=folder).startswith("socket:")
    except OSError:
        return False


def measure_folder(folder: str, most_entries: int, most_depth: int) -> tuple[int, int, int]:
    """Return bytes on disk, entries and depth of a folder, the last two as soon as one is exceeded.

    Args:
        folder: Its path.
        most_entries: When to stop counting.
        most_depth: When to stop descending.
    """
    num_bytes = num_entries = deepest = 0
    queue = [(folder, 0)]
    while queue and num_entries <= most_entries and deepest <= most_depth:
        path, depth = queue.pop()
        deepest = max(deepest, depth)
        try:
            entries = list(os.scandir(path))
        except OSError:
            continue
        num_entries += len(entries)
        for entry in entries:
            with contextlib.suppress(OSError):
                num_bytes += entry.stat(follow_symlinks=False).st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    queue.append((entry.path, depth + 1))
    return num_bytes, num_entries, deepest
