"""Runs untrusted programs one after another, each in a confined process of its own. Started by ``client.py``.

This file runs as a script in an isolated interpreter (``python -I -S``) with an empty environment and talks to its
parent over one socket: length-prefixed JSON, one request per program and one reply per request. Standard library only.

Three processes matter. The *server* builds a private root once (only Python's library, read-only, and an empty
``/tmp``) and waits for requests. For each it forks a *judge*, which makes a new process namespace and forks the
*program* into it; forking a warm interpreter is what makes this cheap. The program gets no network, no other files, an
unprivileged user, limits and a filter on system calls; the judge watches clock, memory and end.

Surprising: how the judge knows that a program ran to its end. Anything the program's process could send, hostile
code in that process could send as well; a secret could be found by it. So nothing is believed that is sent. Before
the program the process blocks in a read, called from one place; the judge notes the stack pointer the kernel shows
for it in ``/proc/PID/syscall``. After the last line it blocks in the same read from the same place, and only there
has the stack that depth: code inside the program stands deeper, and code that left it by an exception, an exit or a
signal never comes back to that place.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confinement as kernel
from judge import DISK_BYTES, MAX_ENTRIES, judge_and_exit
from program import become

del sys.path[0]

import contextlib  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import socket  # noqa: E402
import struct  # noqa: E402
import sysconfig  # noqa: E402
import time  # noqa: E402

_NOBODY = 65534
# Users above this one are ours: they own nothing but what a program made.
_FIRST_OWN_USER = 1_900_000_000
# What honest programs read besides the library.
_ZONES = "/usr/share/zoneinfo"
# Loaded once and shared by every program: what benchmark solutions import, so that a fork starts warm.
_PRELOADED = """
    abc array base64 bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools heapq
    hashlib io itertools json keyword math numbers operator queue random re secrets statistics string struct textwrap
    threading traceback typing unicodedata uuid
""".split()  # noqa: SIM905  (a list of forty strings would take forty lines)
# Where the programs' user cannot read the library all of it is loaded, but for games, screens and installers.
_NOT_PRELOADED = (
    "__",
    "_test",
    "_tkinter",
    "_xx",
    "antigravity",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "readline",
    "this",
)
_NOT_PRELOADED += ("tkinter", "turtle", "venv", "xx")
_PRELOADED_PARTS = """
    collections.abc concurrent.futures.process concurrent.futures.thread encodings.idna encodings.latin_1
    encodings.rot_13 json.tool logging.handlers multiprocessing.dummy multiprocessing.managers multiprocessing.pool
    multiprocessing.popen_fork multiprocessing.shared_memory multiprocessing.synchronize pydoc_data.topics
    unittest.mock urllib.parse urllib.request xml.dom.minidom xml.etree.ElementTree zoneinfo._common
""".split()  # noqa: SIM905


class Server:
    """Holds what was set up once: the confinement, its name by layer, and the handles that outlive the new root."""

    def __init__(self, parent: socket.socket, work_folder: str, without: frozenset[str]):
        self.parent = parent
        self.work_folder = work_folder
        self.without = without
        self.layers: dict[str, str] = {}
        self.notes: list[str] = []
        self.run_uid = os.getuid()
        self.can_limit_processes = True
        self.proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        self.allowed = {"may_load": True, "may_mark": True}
        self.num_programs = 0

    def prepare(self) -> None:
        """Set up all that programs share and find out what this machine can do."""
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                __import__(name)
        _complete_builtins()
        kernel.limit_arenas()
        os.umask(0o022)
        os.environ.clear()  # Python itself may have put LC_CTYPE there.
        self.readable = _library_paths()
        self._choose_user()
        if "namespaces" not in self.without:
            self._enter_namespaces()
        if "files" not in self.layers:
            os.chmod(self.work_folder, 0o711)
            self.scratch = self.work_folder
            self.readable += ["/dev/null", "/dev/urandom", "/dev/zero"]
            # On the host's own file system a file that a program writes could be mapped as code: nothing may be, and
            # what the library has in machine code is loaded now. A user with files elsewhere may not change modes.
            self.allowed = {"may_load": False, "may_mark": self.run_uid >= _FIRST_OWN_USER}
            _preload_extensions()
            self._preload_unreadable()
        self._probe()
        gc.collect()
        gc.freeze()  # Keeps the garbage collector of every program from touching, and so copying, these pages.

    def _preload_unreadable(self) -> None:
        """Load more of the library where the programs' user may not read it, as under root's home."""
        if os.getuid() == self.run_uid or _succeeds_in_child(
            lambda: (become(self.run_uid), open(os.__file__).close())
        ):
            return
        for name in [*sorted(sys.stdlib_module_names), *_PRELOADED_PARTS]:
            if not name.startswith(_NOT_PRELOADED):
                with contextlib.suppress(Exception):
                    __import__(name)
        self.notes.append(
            "Python's library is unreadable to the programs' user; only what is preloaded can be imported"
        )

    def _choose_user(self) -> None:
        if os.getuid() != 0:
            return
        # A user nobody else has: its process limit counts our programs only. Not all containers map it.
        for uid in (_FIRST_OWN_USER + os.getpid(), _NOBODY):
            if _can_become(uid):
                self.run_uid = uid
                self.layers["user"] = f"uid {uid}"
                return
        # Root of a user namespace that maps no other user: an ordinary user outside, whom limits bind.
        if _succeeds_in_child(_fail_to_fork):
            self.layers["user"] = "root of a user namespace, without capabilities"
            return
        self.notes.append("cannot give up root, whose number of processes has no limit")
        self.can_limit_processes = False

    def _enter_namespaces(self) -> None:
        shared = kernel.CLONE_NEWNS | kernel.CLONE_NEWNET | kernel.CLONE_NEWIPC | kernel.CLONE_NEWUTS
        try:
            if os.getuid() != self.run_uid:
                kernel.unshare(shared)
            else:
                uid, gid = os.getuid(), os.getgid()
                kernel.unshare(shared | kernel.CLONE_NEWUSER)
                _write("/proc/self/setgroups", "deny")
                _write("/proc/self/uid_map", f"{uid or _NOBODY} {uid} 1")
                _write("/proc/self/gid_map", f"{gid or _NOBODY} {gid} 1")
                self.run_uid = os.getuid()
            self.layers["network"] = "network namespace"
            self._build_root()
            self.layers["files"] = "mount namespace"
        except OSError as error:
            self.notes.append(f"namespaces: {error}")
        try:
            # Tried in a child: a process may make only one, and each program needs its own.
            if _succeeds_in_child(lambda: kernel.unshare(kernel.CLONE_NEWPID)):
                self.layers["processes"] = "process namespace"
        except OSError as error:
            self.notes.append(f"process namespace: {error}")

    def _build_root(self) -> None:
        root = self.work_folder
        kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
        quiet = kernel.MS_NOSUID | kernel.MS_NODEV
        kernel.mount("tmpfs", root, "tmpfs", quiet, "size=1m,mode=755")
        for path in self.readable:
            _bind_read_only(path, root + path)
        # Other people's packages may hold benchmark answers; the standard library is all a program gets.
        for path in self.readable:
            for name in ("site-packages", "dist-packages", "test"):
                if os.path.isdir(f"{root}{path}/{name}"):
                    kernel.mount("tmpfs", f"{root}{path}/{name}", "tmpfs", quiet | kernel.MS_RDONLY, "size=4k")
        for device in ("null", "zero", "urandom"):
            _bind_read_only(f"/dev/{device}", f"{root}/dev/{device}", devices=True)
        os.mkdir(root + "/tmp")
        os.symlink("/tmp", root + "/dev/shm")  # For the locks of multiprocessing, which lie there as files.
        self._mount_scratch(root + "/tmp")
        kernel.mount("tmpfs", root, "", kernel.MS_REMOUNT | quiet | kernel.MS_RDONLY, "size=1m,mode=755")
        kernel.change_root(root)
        self.scratch = "/tmp"
        self.readable += ["/dev/null", "/dev/urandom", "/dev/zero"]

    def _probe(self) -> None:
        """Try Landlock, seccomp and the end check in children, and name what holds."""
        self.has_landlock = "landlock" not in self.without and _succeeds_in_child(
            lambda: (kernel.forbid_new_privileges(), kernel.restrict_files(self.readable, [self.scratch]))
        )
        if self.has_landlock:
            _add(self.layers, "files", f"Landlock {kernel.landlock_version()}")
        own_pid = None if "processes" in self.layers else 1
        self.has_seccomp = "seccomp" not in self.without and _succeeds_in_child(
            lambda: (kernel.forbid_new_privileges(), kernel.restrict_calls(own_pid, **self.allowed))
        )
        if self.has_seccomp:
            _add(self.layers, "network", "seccomp")
            _add(self.layers, "processes", "seccomp")
        if self.can_limit_processes:
            self.layers["limits"] = "rlimits"
        outcome = self.judge({"source": "", "timeout_s": 10.0})
        self.can_verify_end = outcome["passed"]
        if self.can_verify_end:
            self.layers["end"] = "stack position seen by the kernel"
        else:
            self.notes.append(f"end check: {outcome['reason']}")

    def judge(self, request: dict) -> dict:
        """Run one program in a process of its own and return its outcome.

        Args:
            request: ``source`` and ``as_main``, or ``candidate``, ``tests``, ``imports`` and ``names``; ``timeout_s``.
        """
        start = time.monotonic()
        self._make_scratch()
        reader, writer = os.pipe()
        judge = os.fork()
        if judge == 0:
            os.close(reader)
            judge_and_exit(self, request, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            reply = file.read()
        os.waitpid(judge, 0)
        self._clear_scratch()
        outcome = json.loads(reply) if reply else {"passed": False, "reason": "sandbox: the judge was killed"}
        return {"isolation": "shared", **outcome, "seconds": time.monotonic() - start}

    def _make_scratch(self) -> None:
        """Without a file system of its own, a program gets a new folder: none has its predecessor's mode or times."""
        if self.scratch == "/tmp":
            return
        self.num_programs += 1
        self.scratch = os.path.join(self.work_folder, str(self.num_programs))
        os.mkdir(self.scratch, 0o700)
        if os.getuid() != self.run_uid:
            os.chown(self.scratch, self.run_uid, self.run_uid)

    def _clear_scratch(self) -> None:
        """Give the next program an empty folder with a mode, attributes and times of its own."""
        if self.scratch == "/tmp":
            # A fresh file system is emptier, and quicker, than anything deleted from a tree made to resist deletion.
            kernel.unmount("/tmp")
            self._mount_scratch("/tmp")
        else:
            remove_folder(self.scratch)

    def _mount_scratch(self, target: str) -> None:
        options = f"size={DISK_BYTES},nr_inodes={MAX_ENTRIES},mode=700,uid={self.run_uid}"
        kernel.mount("tmpfs", target, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, options)


def _library_paths() -> list[str]:
    """Where Python's library and the shared libraries it has loaded lie; nothing else of the system is shown."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    # A virtual environment names its own folder for one of them; the modules come from the base installation.
    paths = {os.path.realpath(path) for path in paths if os.path.isfile(os.path.join(path, "os.py"))}
    paths.add(os.path.dirname(os.path.realpath(os.__file__)))
    paths |= {path for path in (_ZONES,) if os.path.isdir(path)}
    with open("/proc/self/maps") as file:
        libraries = {line.split()[-1] for line in file if ".so" in line}
    folders = {os.path.dirname(path) for path in libraries if os.path.isabs(path)}
    paths |= {folder for folder in folders if not any(folder.startswith(path) for path in paths)}
    return sorted(paths)


def _bind_read_only(source: str, target: str, devices: bool = False) -> None:
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w"):
            pass
    kernel.mount(source, target, "", kernel.MS_BIND)
    flags = kernel.MS_NOSUID | kernel.MS_RDONLY | (0 if devices else kernel.MS_NODEV)
    with contextlib.suppress(OSError):  # Locked flags of an outer namespace; the files are still not ours to write.
        kernel.mount("none", target, "", kernel.MS_REMOUNT | kernel.MS_BIND | flags)


def _can_become(uid: int) -> bool:
    return _succeeds_in_child(lambda: become(uid))


def _fail_to_fork() -> None:
    """Succeed if the limit of processes holds."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    try:
        pid = os.fork()
    except OSError:
        return
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    raise OSError("the limit of processes does not hold")


def _succeeds_in_child(action) -> bool:
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1] == 0


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _add(layers: dict[str, str], name: str, layer: str) -> None:
    layers[name] = f"{layers[name]} + {layer}" if name in layers else layer


def remove_folder(folder: str) -> None:
    """Delete a folder made to resist it: without permissions, or deeper than recursion and path names reach.

    Args:
        folder: Its path. What cannot be deleted stays, in nobody's way.
    """
    root = os.path.dirname(folder)
    pending, number = [os.path.basename(folder)], 0
    while pending:
        name = pending.pop()
        path = os.path.join(root, name)
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
            for entry in list(os.scandir(path)):
                if entry.is_dir(follow_symlinks=False):
                    # Moved up instead of followed down, so that no path grows.
                    number += 1
                    with contextlib.suppress(OSError):
                        os.chmod(entry.path, 0o700)
                        os.rename(entry.path, os.path.join(root, f"{name.split('.')[0]}.{number}"))
                        pending.append(f"{name.split('.')[0]}.{number}")
                else:
                    with contextlib.suppress(OSError):
                        os.unlink(entry.path)
            os.rmdir(path)


def _complete_builtins() -> None:
    """Add what an interactive start adds (`help`, `exit`, `quit`); the server's own start leaves it out."""
    import _sitebuiltins
    import builtins

    builtins.help = _sitebuiltins._Helper()
    for name in ("exit", "quit"):
        setattr(builtins, name, _sitebuiltins.Quitter(name, "Ctrl-D (i.e. EOF)"))


def _preload_extensions() -> None:
    """Load the library's modules in machine code, except those for tests and screens."""
    folder = os.path.join(os.path.dirname(os.path.realpath(os.__file__)), "lib-dynload")
    for file in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        name = file.partition(".")[0]
        if not name.startswith(("_test", "_xx", "xx", "_tkinter", "_ctypes_test", "readline")):
            with contextlib.suppress(Exception):
                __import__(name)


def _receive(parent: socket.socket, size: int) -> bytes:
    chunks = b""
    while len(chunks) < size:
        chunk = parent.recv(size - len(chunks))
        if not chunk:
            os._exit(0)
        chunks += chunk
    return chunks


def _send(parent: socket.socket, value: dict) -> None:
    data = json.dumps(value).encode()
    parent.sendall(struct.pack("I", len(data)) + data)


def main() -> None:
    """Set up, report what holds, then serve until the parent closes the socket."""
    parent = socket.socket(fileno=int(sys.argv[1]))
    server = Server(parent, sys.argv[2], frozenset(sys.argv[3].split(",")))
    try:
        server.prepare()
    except BaseException as error:
        _send(parent, {"error": f"{type(error).__name__}: {error}"})
        os._exit(1)
    _send(parent, {"layers": server.layers, "notes": server.notes})
    while True:
        (size,) = struct.unpack("I", _receive(parent, 4))
        _send(parent, server.judge(json.loads(_receive(parent, size))))


if __name__ == "__main__":
    main()
