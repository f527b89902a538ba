"""The process a program under test runs in: what it gives up, and how its end is told from a pretended one.

Called by ``judge.py`` in a process forked for the one program. Standard library only. Since Python
3.11 one Python function calls another without any C frame between them, so the frame at whose depth the end is told
calls nothing that a program could have put its own function in place of. `_STOPS` has no names, only constants, and
whatever looks at the program's exception does so one C frame deeper, in `_attempt`.
"""

import _thread
import contextlib
import functools
import os
import resource
import signal
import sys
import threading
import types
import warnings

import confinement as kernel
from candidate import CandidateServer

MEMORY_BYTES = 1 << 30
FILE_BYTES = 16 << 20
MAX_PROCESSES = 64
MAX_OPEN_FILES = 64
CHANNEL = 3


def become_program(server, request: dict, channel: int) -> None:
    """In the forked child: give everything up, then run the program. Never returns.

    Args:
        server: The `Server` of ``server.py``, which says what holds on this machine.
        request: ``source`` and ``as_main``.
        channel: The handle of the socket to the judge.
    """
    try:
        os.dup2(channel, CHANNEL)
        null = os.open("/dev/null", os.O_RDWR)
        for handle in (0, 1, 2):
            os.dup2(null, handle)
        os.closerange(CHANNEL + 1, 1 << 16)
        confine(server)
        if "tests" in request:
            candidate = CandidateServer(CHANNEL, request.get("as_main", False))
            _fresh_interpreter(as_main=False)
            candidate.serve()
        _become_multithreaded()
        namespace = _fresh_interpreter(as_main=request.get("as_main", False))
        _guard_interpreter(server.readable)
    except BaseException as error:
        os.write(CHANNEL, f"Esandbox set-up: {type(error).__name__}: {error}".encode()[:200])
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

    Nothing here is trusted. The exception goes on to the caller whatever a program has replaced.
    """
    try:
        execute(source, namespace)
    except BaseException as error:
        write(CHANNEL, b"E" + name_of(kind(error)).encode("utf-8", "replace")[:200] + b"\n")
        raise


def confine(server, is_alone: bool = True) -> None:
    """Give up all that a program has no business with, for good.

    Args:
        server: The `Server` of ``server.py``.
        is_alone: Whether the process stands in a process namespace of its own, where the machine has such.
    """
    own_pid = None
    os.setpgid(0, 0)
    if not is_alone or "namespace" not in server.layers.get("processes", ""):
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
        become(server.run_uid)
    with contextlib.nullcontext() if server.run_uid == 0 else contextlib.suppress(OSError):
        kernel.drop_capabilities()
    kernel.die_with_parent()
    if server.has_seccomp:
        kernel.restrict_calls(own_pid, **server.allowed)


def _fresh_interpreter(as_main: bool) -> dict:
    """Take our modules out of sight."""
    for name in ["candidate", "confinement", "judge", "plain_data", "program", "tester", "sysconfig", "__main__"]:
        sys.modules.pop(name, None)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv[:] = [""]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    # The references run a program in an empty namespace, where __name__ is "builtins".
    return module.__dict__ if as_main else {}


def _guard_interpreter(readable: list[str]) -> None:
    """Forbid, from inside Python, what only attacks need, where program and verdict share an interpreter.

    The audit hook is not a boundary; the kernel is. It keeps honest-looking tricks (tracing functions that jump over
    assertions, raw memory through ctypes) from reaching the frame that reports the end.
    """

    def set_trace(function, settrace=sys.settrace):
        # To end tracing is harmless, and doctest does it.
        if function is not None:
            settrace(function)

    sys.settrace = set_trace
    sys.addaudithook(_make_hook(readable))


def _make_hook(readable: list[str]):
    names = "sys.settrace sys.addaudithook sys._current_frames sys._current_exceptions"
    names += " sys.monitoring.register_callback"
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


def become(uid: int) -> None:
    """Take on another user's rights for good.

    Args:
        uid: The user, and the group of the same number.
    """
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
