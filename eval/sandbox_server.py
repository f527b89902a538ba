"""Runs untrusted programs one after another, each in a confined process of its own. Started by ``sandbox.py``.

This file runs as a script in an isolated interpreter (``python -I -S``) with an empty environment and talks to its
parent over one socket: length-prefixed JSON, a request a program, a reply a request. Standard library only.

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

That holds for the C stack only: since Python 3.11 one Python function calls another without any C frame between them.
So the frame at that place calls nothing that a program could have put its own function in place of: `_STOPS` has no
names, only constants, and whatever looks at the program's exception does so one C frame deeper, in `_attempt`.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import confinement as kernel

del sys.path[0]

import _thread  # noqa: E402
import contextlib  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import json  # noqa: E402
import resource  # noqa: E402
import select  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import struct  # noqa: E402
import sysconfig  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import types  # noqa: E402
import warnings  # noqa: E402

MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
DISK_BYTES = 64 << 20
MAX_PROCESSES = 32
MAX_OPEN_FILES = 64
TICK_S = 0.02
# How long a process that says it has arrived may take to block in its read, threads and a loaded machine considered.
ARRIVAL_S = 2.0
_CHANNEL = 3
_NOBODY = 65534
# Loaded once and shared by every program: what benchmark solutions import, so that a fork starts warm.
_PRELOADED = """
    abc array base64 bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools heapq
    hashlib io itertools json keyword math numbers operator queue random re secrets statistics string struct textwrap
    threading traceback typing unicodedata uuid
""".split()  # noqa: SIM905  (a list of forty strings would take forty lines)
_PRELOADED_IF_UNREADABLE = """
    ast asyncio bz2 cmath collections.abc concurrent.futures contextlib csv difflib email fnmatch gettext glob
    graphlib html inspect ipaddress locale logging lzma multiprocessing optparse pathlib pickle platform pprint pstats
    sqlite3 ssl stringprep subprocess tempfile timeit tokenize types unittest urllib.parse weakref
    xml.dom.minidom xml.etree.ElementTree zipfile zlib zoneinfo encodings.idna encodings.latin_1 encodings.rot_13
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
        self.devices: dict[str, int] = {}

    def prepare(self) -> None:
        """Set up all that programs share and find out what this machine can do."""
        for name in _PRELOADED:
            with contextlib.suppress(ImportError):
                __import__(name)
        os.umask(0o022)
        os.environ.clear()  # Python itself may have put LC_CTYPE there.
        self.readable = _library_paths()
        self._choose_user()
        if "namespaces" not in self.without:
            self._enter_namespaces()
        if "files" not in self.layers:
            os.chown(self.work_folder, self.run_uid, -1)
            os.chmod(self.work_folder, 0o700)
            self.scratch = self.work_folder
            self.readable += ["/dev/null", "/dev/urandom", "/dev/zero"]
            self._preload_unreadable()
        self._probe()
        gc.collect()
        gc.freeze()  # Keeps the garbage collector of every program from touching, and so copying, these pages.

    def _preload_unreadable(self) -> None:
        """Load more of the library where the programs' user may not read it, as under root's home."""
        if os.getuid() == self.run_uid or _succeeds_in_child(
            lambda: (_become(self.run_uid), open(os.__file__).close())
        ):
            return
        for name in _PRELOADED_IF_UNREADABLE:
            with contextlib.suppress(ImportError):
                __import__(name)
        self.notes.append(
            "Python's library is unreadable to the programs' user; only what is preloaded can be imported"
        )

    def _choose_user(self) -> None:
        if os.getuid() != 0:
            return
        # A user nobody else has: its process limit counts our programs only. Not all containers map it.
        for uid in (1_900_000_000 + os.getpid(), _NOBODY):
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
            lambda: (kernel.forbid_new_privileges(), kernel.restrict_calls(own_pid))
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
            request: ``source``, ``timeout_s``, and ``as_main``.
        """
        start = time.monotonic()
        reader, writer = os.pipe()
        judge = os.fork()
        if judge == 0:
            os.close(reader)
            _judge_and_exit(self, request, writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as file:
            reply = file.read()
        os.waitpid(judge, 0)
        self._clear_scratch()
        outcome = json.loads(reply) if reply else {"passed": False, "reason": "sandbox: the judge was killed"}
        return {**outcome, "seconds": time.monotonic() - start}

    def _clear_scratch(self) -> None:
        """Give the next program an empty folder. What cannot be emptied ends the server; the parent starts another."""
        if not os.listdir(self.scratch):
            return
        if self.scratch == "/tmp":
            # A fresh file system is emptier, and quicker, than anything deleted from a tree made to resist deletion.
            kernel.unmount("/tmp")
            self._mount_scratch("/tmp")
            return
        for entry in list(os.scandir(self.scratch)):
            if entry.is_dir(follow_symlinks=False):
                _make_removable(entry.path)
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)

    def _mount_scratch(self, target: str) -> None:
        options = f"size={DISK_BYTES},nr_inodes=4096,mode=700,uid={self.run_uid}"
        kernel.mount("tmpfs", target, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV | kernel.MS_NOEXEC, options)


def _judge_and_exit(server: Server, request: dict, writer: int) -> None:
    try:
        outcome = _Judge(server, request).run()
    except BaseException as error:
        outcome = {"passed": False, "reason": f"sandbox: {type(error).__name__}: {error}"}
    os.write(writer, json.dumps(outcome).encode())
    os._exit(0)


class _Judge:
    """Starts one program, waits for its end, and decides."""

    def __init__(self, server: Server, request: dict):
        self.server = server
        self.request = request
        self.init = 0

    def run(self) -> dict:
        server = self.server
        kernel.adopt_orphans()
        server.parent.close()
        if server.layers.get("processes", "").startswith("process namespace"):
            kernel.unshare(kernel.CLONE_NEWPID)
            self.init = _fork_init()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.pid = os.fork()
        if self.pid == 0:
            ours.close()
            _become_program(server, self.request, theirs.detach())
        theirs.close()
        self.channel = ours
        try:
            return self._watch()
        finally:
            self._kill()

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
            if len(fields) == 9 and int(fields[1], 16) == _CHANNEL:
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
        if len(family) > 1 and sum(self._resident_bytes(pid) for pid in family) > MEMORY_BYTES:
            return "used too much memory"
        if self.server.scratch != "/tmp" and _disk_bytes(self.server.scratch) > DISK_BYTES:
            return "wrote too much"
        return None

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
        kernel.die_with_parent()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while True:
            signal.pause()
    return pid


def _become_program(server: Server, request: dict, channel: int) -> None:
    """In the forked child: give everything up, then run the program. Never returns."""
    try:
        os.dup2(channel, _CHANNEL)
        null = os.open("/dev/null", os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        os.closerange(_CHANNEL + 1, 1 << 16)
        _confine(server)
        _become_multithreaded()
        namespace = _fresh_interpreter(server, as_main=request.get("as_main", False))
    except BaseException as error:
        os.write(_CHANNEL, f"Esandbox set-up: {type(error).__name__}: {error}".encode()[:200])
        os._exit(1)
    attempt = functools.partial(_attempt, request["source"], namespace)
    _compile_stops(attempt, os.read, os.write, os._exit)()


def _become_multithreaded() -> None:
    """Start a thread that ends at once: from then on the C library calls read differently, with another stack depth.

    A program that starts threads itself would otherwise end at another depth than it began.
    """
    done = threading.Lock()
    done.acquire()
    _thread.start_new_thread(done.release, ())
    done.acquire()


# The program between two stops at the same depth of the same frame. Each placeholder becomes a constant of the code
# object: a name could be bound anew by the program (a builtin, a global, from Python 3.13 on even a local of a frame).
# In the handler nothing comes before the call that never returns: behind any other a signal's handler might run.
_STOPS = """
def run():
    '<write>'(3, b'r')
    '<read>'(3, 1)
    try:
        '<attempt>'()
    except '<everything>':
        '<leave>'(1)
    '<write>'(3, b'r')
    '<read>'(3, 1)
    '<leave>'(1)
"""


def _compile_stops(attempt, read, write, leave):
    values = {"attempt": attempt, "read": read, "write": write, "leave": leave, "everything": BaseException}
    values = {f"<{name}>": value for name, value in values.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # That a text is called, which it will not be.
        module = compile(_STOPS, "<stops>", "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, types.CodeType))
    constants = tuple(values.get(c, c) if isinstance(c, str) else c for c in code.co_consts)
    return types.FunctionType(code.replace(co_consts=constants), {})


def _attempt(source, namespace, execute=exec, write=os.write, name_of=type.__dict__["__name__"].__get__, kind=type):
    """Run the program and tell the name of its exception; called through C, so deeper than the stops.

    Surprising: nothing here is trusted. The exception goes on to the caller whatever a program has replaced.
    """
    try:
        execute(source, namespace)
    except BaseException as error:
        write(_CHANNEL, b"E" + name_of(kind(error)).encode("utf-8", "replace")[:200] + b"\n")
        raise


def _confine(server: Server) -> None:
    own_pid = None
    os.setpgid(0, 0)
    if "namespace" not in server.layers.get("processes", ""):
        own_pid = os.getpid()
    os.chdir(server.scratch)
    limits = {
        resource.RLIMIT_AS: MEMORY_BYTES,
        resource.RLIMIT_FSIZE: FILE_BYTES,
        resource.RLIMIT_NPROC: MAX_PROCESSES,
        resource.RLIMIT_NOFILE: MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))
    kernel.forbid_new_privileges()
    if server.has_landlock:
        # Before the change of user, who may be unable to open the paths that are to be allowed.
        kernel.restrict_files(server.readable, [server.scratch])
    if os.getuid() != server.run_uid:
        _become(server.run_uid)
    with contextlib.nullcontext() if server.run_uid == 0 else contextlib.suppress(OSError):
        kernel.drop_capabilities()
    kernel.die_with_parent()
    if server.has_seccomp:
        kernel.restrict_calls(own_pid)


def _fresh_interpreter(server: Server, as_main: bool) -> dict:
    """Take our modules out of sight and forbid, from inside Python, what only attacks need.

    The audit hook is no boundary; the kernel is. It keeps honest-looking tricks (tracing functions that jump over
    assertions, searches of the heap, raw memory through ctypes) from reaching the frame that reports the end.
    """
    for name in ("confinement", "ctypes", "_ctypes", "sysconfig", "socket", "_socket", "resource", "__main__"):
        sys.modules.pop(name, None)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv[:] = [""]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    sys.addaudithook(_make_hook(server.readable))
    # The references run a program in an empty namespace, where __name__ is "builtins".
    return module.__dict__ if as_main else {}


def _make_hook(readable: list[str]):
    names = "sys.settrace sys.setprofile sys.addaudithook sys._current_frames sys._current_exceptions"
    names += " gc.get_objects gc.get_referrers gc.get_referents sys.monitoring.register_callback"
    forbidden = frozenset(names.split())
    folders = tuple(readable)
    modules = frozenset(("ctypes", "_ctypes", "_testcapi", "_testinternalcapi", "_xxsubinterpreters", "_interpreters"))

    def hook(event, arguments, forbidden=forbidden, modules=modules, error=RuntimeError):
        if event in forbidden or event.startswith("ctypes."):
            raise error(f"{event} is not available to a program under test")
        if event != "import":
            return
        name, path = arguments[:2]
        # A library's entry point is named after the last part alone, so `x._ctypes` loads the same.
        if name.rpartition(".")[2] in modules or (path is not None and not path.startswith(folders)):
            raise error(f"{name} is not available to a program under test")

    return hook


def _library_paths() -> list[str]:
    """Where Python's library and the shared libraries it has loaded lie; nothing else of the system is shown."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    # A virtual environment names its own folder for one of them; the modules come from the base installation.
    paths = {os.path.realpath(path) for path in paths if os.path.isfile(os.path.join(path, "os.py"))}
    paths.add(os.path.dirname(os.path.realpath(os.__file__)))
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
    return _succeeds_in_child(lambda: _become(uid))


def _become(uid: int) -> None:
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


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


def _make_removable(folder: str) -> None:
    """Give back the permissions a program took from its own folders."""
    os.chmod(folder, 0o700)
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(parent, name)
            if not os.path.islink(path):
                os.chmod(path, 0o700)


def _disk_bytes(folder: str) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total


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
