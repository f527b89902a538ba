"""Programs that try to pass without passing, to reach out, or to do harm; and honest ones a little like them.

Each hostile program would count as passed if its trick worked: most end in ``assert False`` or never get to their
assertion. Data only; ``test_hostile.py`` runs them, and ``compare_sandboxes.py`` runs them under other
harnesses.
"""

# Tricks that aim at the verdict: the program is wrong and wants to be called right.
VERDICT = {
    "os_exit": "import os\nos._exit(0)\nassert False",
    "sys_exit": "import sys\nsys.exit(0)\nassert False",
    "raise_system_exit": "raise SystemExit(0)\nassert False",
    "system_exit_in_thread": """
import threading, os
def leave():
    os._exit(0)
thread = threading.Thread(target=leave)
thread.start()
thread.join()
assert False
""",
    "quit_builtin": """
import builtins
getattr(builtins, 'quit', exit if 'exit' in dir(builtins) else __import__('sys').exit)()
""",
    "exit_in_atexit": "import atexit, os\natexit.register(os._exit, 0)\nassert False",
    "exit_in_excepthook": """
import os, sys
sys.excepthook = lambda *arguments: os._exit(0)
assert False
""",
    "exit_in_finalizer": """
import os
class Last:
    def __del__(self):
        os._exit(0)
keep = Last()
assert False
""",
    "error_with_hostile_text": """
import os
class Quiet(Exception):
    def __str__(self):
        os._exit(0)
    __repr__ = __str__
raise Quiet
""",
    "error_with_hostile_class": """
import os
class Meta(type):
    def __getattribute__(self, name):
        os._exit(0)
class Quiet(BaseException, metaclass=Meta):
    pass
raise Quiet
""",
    "shout_success_on_all_handles": """
import os
for handle in range(64):
    for text in (b'passed', b'r', b'ok\\n', b'{"passed": true, "reason": "passed"}', b'\\x80\\x04\\x88.'):
        try:
            os.write(handle, text)
        except OSError:
            pass
assert False
""",
    "fake_the_end_message": "import os\nos.write(3, b'r')\nos.read(3, 1)\nassert False",
    "fake_the_end_from_a_thread": """
import os, threading, time
threading.Thread(target=lambda: (os.write(3, b'r'), os.read(3, 1)), daemon=True).start()
time.sleep(0.5)
assert False
""",
    "fake_the_end_from_a_child": """
import os, time
if os.fork() == 0:
    raise ValueError
time.sleep(0.3)
os.write(3, b'r')
time.sleep(9)
""",
    "child_reaches_the_end": """
import os, time
if os.fork():
    time.sleep(0.5)
    assert False
""",
    "fake_the_end_from_a_signal": """
import os, signal, time
def fake(number, frame):
    os.write(3, b'r')
    os.read(3, 1)
signal.signal(signal.SIGALRM, fake)
signal.setitimer(signal.ITIMER_REAL, 0.05)
time.sleep(0.5)
assert False
""",
    "signal_while_failing": """
import os, signal
def fake(number, frame):
    os.write(3, b'r')
    os.read(3, 1)
signal.signal(signal.SIGALRM, fake)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
try:
    while True:
        pass
finally:
    assert False
""",
    "close_the_channel": """
import os
for handle in range(3, 64):
    try:
        os.close(handle)
    except OSError:
        pass
assert False
""",
    "search_the_callers": """
import sys
frame = sys._getframe()
while frame:
    for values in (frame.f_locals, frame.f_globals):
        for name, value in list(values.items()):
            if isinstance(value, list):
                value.append('passed')
            if isinstance(value, dict) and 'passed' in value:
                value['passed'] = True
    frame = frame.f_back
assert False
""",
    "append_to_the_callers_result": """
import sys
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if name in ('result', 'results', 'outcome', 'status') and hasattr(value, 'append'):
            value.append('passed')
    frame = frame.f_back
assert False
""",
    "append_and_die": """
import sys, posix
frame = sys._getframe()
while frame:
    for name, value in list(frame.f_locals.items()):
        if name in ('result', 'results', 'outcome', 'status') and hasattr(value, 'append'):
            value.append('passed')
    frame = frame.f_back
posix._exit(0)
""",
    "search_the_heap": """
import gc
for thing in gc.get_objects():
    if type(thing).__name__ in ('Connection', 'ListProxy', 'list') and hasattr(thing, 'append'):
        try:
            thing.append('passed')
        except Exception:
            pass
assert False
""",
    "trace_over_the_assertion": """
import sys
def jump(frame, event, argument):
    if event == 'line' and frame.f_lineno == 9:
        frame.f_lineno = 10
    return jump
sys._getframe().f_trace = jump
sys.settrace(jump)
assert False
done = True
""",
    "trace_the_caller": """
import sys
caller = sys._getframe().f_back
def jump(frame, event, argument):
    if frame is caller and event == 'line':
        frame.f_lineno = frame.f_lineno + 2
    return jump
caller.f_trace = jump
sys.settrace(jump)
raise ValueError
""",
    "patch_assertion_error": "import builtins\nbuiltins.AssertionError = type('Fine', (), {})\nassert False",
    "patch_exec_and_compile": """
import builtins, os
builtins.exec = builtins.compile = builtins.eval = lambda *a, **k: None
os._exit = os.read = os.write = lambda *a: b'r'
assert False
""",
    "patch_unittest": """
import unittest
unittest.TestCase.assertEqual = lambda *a: None
unittest.TestCase.run = lambda *a: None
assert 1 == 2
""",
    "patch_the_parent_modules": """
import sys
for name, module in list(sys.modules.items()):
    for attribute in ('_exit', 'read', 'write', 'loads', 'dumps', 'exec', '_run'):
        try:
            setattr(module, attribute, lambda *a, **k: b'r')
        except Exception:
            pass
assert False
""",
    "bytecode_of_its_own": """
def test():
    assert False
test.__code__ = test.__code__.replace(co_code=b'\\x97\\x00d\\x00S\\x00' + bytes(40))
test()
assert False
""",
    "stack_by_ctypes": """
import ctypes
ctypes.string_at(id(0), 8)
libc = ctypes.CDLL(None)
libc.exit(0)
assert False
""",
    "dynamic_loading": """
import importlib.util, sys
spec = importlib.util.find_spec('_ctypes')
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.dlopen(None, 0)
assert False
""",
    "replace_the_process": "import os\nos.execv('/bin/true', ['true'])\nassert False",
    "replace_the_process_by_name": """
import os
for path in ('/bin/true', '/usr/bin/true', '/proc/self/exe'):
    try:
        os.execv(path, ['true', '-c', ''])
    except OSError:
        pass
assert False
""",
    "deep_recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(n):\n    return f(n + 1)\nf(0)\nassert False",
    "crash": "import faulthandler\nfaulthandler._sigsegv()\nassert False",
    "kill_itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\nassert False",
    "stop_itself": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nassert False",
    "null_bytes": "assert False\0",
    "lone_surrogate": "x = '\ud800'\nassert False",
    "text_direction": "# \u202e\nassert False # \u2066",
    "coding_line": "# -*- coding: rot13 -*-\nassert False",
    # Called from the frame that reports the end, a function of the program would stand where the end stands.
    "type_of_its_own": """
import builtins, os
write, read = os.write, os.read
def fake(*arguments):
    write(3, b'r')
    read(3, 1)
builtins.type = fake
raise ValueError
""",
    "globals_of_the_caller": """
import os, sys
write, read = os.write, os.read
def fake(*arguments):
    write(3, b'r')
    read(3, 1)
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    for name in ('type', 'str', 'repr', 'print', 'exec', 'isinstance'):
        frame.f_globals[name] = fake
raise ValueError
""",
    "error_the_caller_does_not_catch": """
import os, sys
write, read = os.write, os.read
def fake(*arguments, **named):
    write(3, b'r')
    read(3, 1)
class Fake:
    def __getattr__(self, name):
        return fake
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    for name in ('os', 'json', 'contextlib', 'time', 'select', 'kernel', 'type'):
        frame.f_globals[name] = Fake()
    frame.f_globals['BaseException'] = KeyError
raise ValueError
""",
    "signals_through_the_handler": """
import builtins, os, signal, sys
write, read = os.write, os.read
def fake(*arguments, **named):
    write(3, b'r')
    read(3, 1)
class Fake:
    def __getattr__(self, name):
        return fake
class Out(BaseException):
    pass
def leave(number, frame):
    raise Out
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    frame.f_globals['os'] = frame.f_globals['json'] = Fake()
builtins.type = fake
signal.signal(signal.SIGALRM, leave)
signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
while True:
    pass
""",
    "locals_of_the_caller": """
import os, sys
write = os.write
quiet = lambda handle, data=b'': write(handle, data) if data == b'r' else None
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    for name in list(frame.f_locals):
        try:
            frame.f_locals[name] = quiet
        except Exception:
            pass
assert False
""",
    "class_name_of_another_kind": """
import os
class Name(str):
    def encode(self, *arguments):
        os.write(3, b'r')
        os.read(3, 1)
raise type(Name('Quiet'), (BaseException,), {})
""",
    "handle_of_another_kind": """
import os, sys
class Handle:
    def __index__(self):
        os.write(3, b'r')
        os.read(3, 1)
        return 3
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
    frame.f_globals['_CHANNEL'] = Handle()
raise ValueError
""",
    "empty_the_builtins": "import builtins\nbuiltins.__dict__.clear()\nassert False",
    "parent_leaves_and_child_stays": """
import os, time
if os.fork():
    os._exit(0)
time.sleep(0.2)
""",
    "exit_by_faulthandler": """
import faulthandler, os, time
faulthandler.dump_traceback_later(0.05, exit=True, file=os.open('/dev/null', os.O_WRONLY))
time.sleep(0.5)
assert False
""",
    "lower_its_own_limits": """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
try:
    block = bytearray(1 << 24)
except MemoryError:
    pass
assert False
""",
    "recursion_in_c": """
import sys
sys.setrecursionlimit(10 ** 9)
nested = []
for _ in range(10 ** 6):
    nested = [nested]
repr(nested)
assert False
""",
    "surrogates_to_the_output": """
import sys
sys.stdout.reconfigure(errors='surrogatepass')
print('\\ud800' * 9)
assert False
""",
    "main_guard_only": "assert __name__ == '__main__', 'the references skip such a block'",
}

# Tricks that aim at the host or a neighbor. Each raises when the world is closed, and would pass if it were open.
REACH = {
    "endless_loop": "while True:\n    pass",
    "sleep": "import time\ntime.sleep(3600)",
    "ignore_signals": """
import signal, time
for number in range(1, 64):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
time.sleep(3600)
""",
    "fork_bomb": "import os\nwhile True:\n    os.fork()",
    "fork_bomb_that_lives": """
import os, time
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(60)
""",
    "thread_bomb": """
import threading, time
while True:
    threading.Thread(target=time.sleep, args=(60,)).start()
""",
    "memory_bomb": "blocks = []\nwhile True:\n    blocks.append(bytearray(1 << 26))",
    "memory_bomb_in_children": """
import os, time
for _ in range(16):
    if os.fork() == 0:
        block = bytearray(900 << 20)
        time.sleep(60)
time.sleep(60)
""",
    "huge_integer": "x = 10 ** 10 ** 9\nassert str(x)",
    "compile_bomb": "x = " + "(" * 5000 + ")" * 5000,
    "regex_bomb": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')\nassert False",
    "output_flood": "import os\nwhile True:\n    print('x' * 65536)\n    os.write(2, b'x' * 65536)",
    "disk_bomb": """
import os
number = 0
while True:
    with open(f'f{number}', 'wb') as file:
        file.write(bytes(8 << 20))
    number += 1
""",
    "inode_bomb": "n = 0\nwhile True:\n    open(f'f{n}', 'w').close()\n    n += 1",
    "zip_bomb": """
import zlib
packed = zlib.compress(bytes(1 << 28))
kept = [zlib.decompress(packed) for _ in range(16)]
""",
    "pickle_bomb": """
import pickle
class Payload:
    def __reduce__(self):
        import os
        return (os._exit, (0,))
pickle.loads(pickle.dumps(Payload()))
assert False
""",
    "raise_limits": """
import resource
for name in ('RLIMIT_AS', 'RLIMIT_NPROC', 'RLIMIT_FSIZE', 'RLIMIT_CPU', 'RLIMIT_NOFILE'):
    soft, hard = resource.getrlimit(getattr(resource, name))
    resource.setrlimit(getattr(resource, name), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
bytearray(4 << 30)
""",
    "limits_of_others": "import os, resource\nresource.prlimit(os.getppid() or 1, resource.RLIMIT_CPU, (1, 1))",
    "kill_the_parent": """
import os, signal
parent = os.getppid()
assert parent > 1, 'nobody to kill'
os.kill(parent, signal.SIGKILL)
""",
    "kill_everybody": """
import os, signal
sent = 0
for pid in range(2, 1 << 16):
    if pid != os.getpid():
        try:
            os.kill(pid, signal.SIGKILL)
            sent += 1
        except OSError:
            pass
assert sent
""",
    "kill_all_by_broadcast": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "kill_the_group": "import os, signal\nos.killpg(os.getpgid(os.getppid()) or 1, signal.SIGKILL)",
    "daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(0)
os.wait()
assert False
""",
    "read_passwd": "assert open('/etc/passwd').read()",
    "read_home": "import os\nassert os.listdir('/root') or os.listdir('/home')",
    "read_environment": "import os\nassert os.environ",
    "read_environment_of_others": """
import glob
texts = [open(path, 'rb').read() for path in glob.glob('/proc/[0-9]*/environ') + ['/proc/self/environ']]
assert any(texts)
""",
    "read_the_answers": """
import glob
found = []
for base in ('/work', '/root', '/usr/lib/python3', '/usr/local', '/opt', '/home', '/tmp'):
    found += glob.glob(base + '/**/humaneval*', recursive=True)
assert found
""",
    "read_own_memory": "assert open('/proc/self/mem', 'rb')",
    "read_own_command_line": "assert open('/proc/self/cmdline', 'rb').read()",
    "read_the_sandbox": "import glob\nassert glob.glob('/**/server.py', recursive=True)",
    "delete_everything": """
import shutil
errors = []
shutil.rmtree('/', onerror=lambda *arguments: errors.append(arguments))
assert not errors
""",
    "write_outside": """
import os
written = []
for folder in ('/', '/etc', '/var/tmp', '/dev/shm', '/root', '/home', os.path.dirname(os.__file__)):
    try:
        path = os.path.join(folder, 'deepseek-moe-was-here')
        open(path, 'w').close()
        if folder != '/dev/shm':  # The program may have one of its own there; the host's is looked at afterwards.
            written.append(path)
    except OSError:
        pass
assert written
""",
    "symlink_out": """
import os
os.symlink('/etc', 'etc')
assert open('etc/passwd').read()
""",
    "hard_link_out": "import os\nos.link('/etc/shadow', 'shadow')\nassert open('shadow').read()",
    "leave_by_dotdot": "assert open('../../../../etc/passwd').read()",
    "leave_the_root": "import os\nos.mkdir('x')\nos.chroot('x')\nos.chdir('../../../..')",
    "become_root": "import os\nos.setuid(0)",
    "new_namespace": """
import os
os.unshare(0x10000000) if hasattr(os, 'unshare') else (_ for _ in ()).throw(OSError)
""",
    "mount_by_subprocess": "import subprocess\nsubprocess.run(['mount', '-t', 'tmpfs', 'none', '/tmp'], check=True)",
    "shell_by_posix": "import posix\nassert posix.system('true') == 0",
    "fork_by_posix": """
import posix, time
while True:
    try:
        posix.fork()
    except OSError:
        time.sleep(60)
""",
    "kill_the_parent_by_posix": """
import posix
parent = posix.getppid()
assert parent > 1, 'nobody to kill'
posix.kill(parent, 9)
""",
    "shell": "import os\nassert os.system('true') == 0",
    "tcp_socket": "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=1)",
    "loopback_server": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()",
    "dns": "import socket\nassert socket.getaddrinfo('example.com', 80)",
    "unix_socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect('/run/systemd/private')",
    "abstract_socket": "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('\\0deepseek-moe')",
    "raw_socket": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "shared_memory": """
from multiprocessing import shared_memory
shared_memory.SharedMemory("deepseek_moe_of_another", size=4096)
""",
    "device": "assert open('/dev/mem', 'rb') or open('/dev/kmsg', 'rb')",
    "make_a_device": "import os, stat\nos.mknod('sda', stat.S_IFBLK | 0o600, os.makedev(8, 0))",
    "set_the_clock": "import time\ntime.clock_settime(time.CLOCK_REALTIME, 0)",
    "set_the_name": "import socket\nsocket.sethostname('pwned')",
    "install_a_package": """
import subprocess, sys
subprocess.check_call([sys.executable or 'python3', '-m', 'pip', 'install', 'x'])
""",
    "sleep_in_a_finalizer": """
import time
class Slow:
    def __del__(self):
        time.sleep(3600)
Slow()
""",
    "finalizer_that_is_never_done": """
class Phoenix:
    def __del__(self):
        Phoenix()
        Phoenix()
while True:
    Phoenix()
""",
    "nul_flood": "import sys\nwhile True:\n    sys.stdout.write('\\0' * 10 ** 9)",
    "program_from_memory": """
import os
handle = os.memfd_create('x')
os.write(handle, b'#!/bin/true\\n')
os.execve(handle, ['x'], {})
""",
    "root_of_another_process": "import os\nassert os.listdir('/proc/1/root') or os.listdir('/proc/self/root/etc')",
    "handles_of_another_process": """
import os
assert [os.readlink('/proc/1/fd/' + name) for name in os.listdir('/proc/1/fd')]
""",
    "ctypes_by_another_name": """
import _imp, glob, importlib.machinery, os
path = next(iter(glob.glob(os.path.join(os.path.dirname(os.__file__), 'lib-dynload', '_ctypes.*'))))
_imp.create_dynamic(importlib.machinery.ModuleSpec('x._ctypes', None, origin=path))
""",
    "library_of_its_own": """
import _imp, glob, importlib.machinery, os, shutil
path = next(iter(glob.glob(os.path.join(os.path.dirname(os.__file__), 'lib-dynload', '_contextvars.*'))))
shutil.copy(path, 'x.so')
_imp.create_dynamic(importlib.machinery.ModuleSpec('_contextvars', None, origin=os.path.abspath('x.so')))
""",
    "code_in_writable_memory": """
import mmap
mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
""",
}

# What a machine without namespaces let pass before.
REACH_WITHOUT_NAMESPACES = {
    "datagram_to_anybody": """
import socket
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
ours.sendto(b'x', '/dev/log')
""",
    "message_to_an_address": """
import socket
ours, theirs = socket.socketpair()
try:
    ours.sendto(b'x', '/dev/log')
except PermissionError:
    assert False
except OSError:
    pass
""",
    "handles_in_a_message": "import array, socket\na, b = socket.socketpair()\nsocket.send_fds(a, [b'x'], [0])",
    "larger_socket_buffers": "import socket\na, b = socket.socketpair()\na.setsockopt(1, 7, 1 << 20)",
    "larger_pipe": "import fcntl, os\nfcntl.fcntl(os.pipe()[1], 1031, 1 << 20)",
    "signals_of_a_handle": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getppid() or 1)",
    "signal_of_a_handle": "import fcntl, os\nfcntl.fcntl(os.pipe()[0], 10, 9)",
    "code_in_a_file": """
import mmap
with open('code', 'wb') as file:
    file.write(bytes(4096))
with open('code', 'rb') as file:
    mmap.mmap(file.fileno(), 4096, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
""",
    "slow_down_others": """
import os
found = 0
for pid in range(2, 1 << 16):
    if pid != os.getpid():
        for change in (lambda: os.setpriority(os.PRIO_PROCESS, pid, 19), lambda: os.sched_setaffinity(pid, {0}),
                       lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))):
            try:
                change()
                found += 1
            except OSError:
                pass
assert found
""",
    "disk_without_names": """
import os, time
kept = []
for number in range(20):
    kept.append(open('x', 'wb'))
    os.unlink('x')
    kept[-1].write(bytes(8 << 20))
    kept[-1].flush()
    time.sleep(0.01)
time.sleep(0.1)
""",
    "disk_without_handles": """
import mmap, os, time
kept = []
for number in range(20):
    with open('x', 'w+b') as file:
        file.truncate(8 << 20)
        kept.append(mmap.mmap(file.fileno(), 8 << 20))
    os.unlink('x')
    kept[-1].write(b'x' * (8 << 20))
    time.sleep(0.01)
time.sleep(0.1)
""",
    "modes_of_others": "import os\nos.chmod('/tmp' if os.getcwd() != '/tmp' else '/', 0o777)",
    "deep_folder": """
import os
for _ in range(1500):
    os.mkdir('d')
    os.chdir('d')
assert False
""",
    "closed_folder": """
import os
os.mkdir('x')
os.chmod('x', 0)
os.fchmod(os.open('.', os.O_RDONLY), 0)
assert False
""",
}

HOSTILE = {**VERDICT, **REACH, **REACH_WITHOUT_NAMESPACES}

# What honest candidates do. Each must pass, beside any number of hostile neighbors.
HONEST = {
    "arithmetic": "def add(a, b):\n    return a + b\nassert add(2, 3) == 5",
    "unicode": "s = 'na\u00efve \u6df1\u5ea6 \U0001f40b'\nassert s.encode().decode() == s",
    "threads": """
import threading
done = []
threads = [threading.Thread(target=done.append, args=(n,)) for n in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert sorted(done) == [0, 1, 2, 3]
""",
    "thread_left_running": "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    "child_that_exits": "import os\npid = os.fork()\nif pid == 0:\n    os._exit(0)\nassert os.wait()[0] == pid",
    "temporary_file": """
import os, tempfile
with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'x')
    open(path, 'w').write('hello')
    assert open(path).read() == 'hello'
""",
    "printing": "print('x' * 100000)\nimport sys\nsys.stderr.write('y')",
    "dataclass": "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nassert P(1) == P(1)",
    "namedtuple": "from collections import namedtuple\nassert namedtuple('P', 'x y')(1, 2).y == 2",
    "lazy_imports": """
import sqlite3, asyncio, xml.dom.minidom, csv, zlib, hashlib, inspect, fractions
assert hashlib.md5(b'x')
""",
    "asyncio": """
import asyncio
async def f():
    await asyncio.sleep(0)
    return 7
assert asyncio.run(f()) == 7
""",
    "caught_error": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
    "caught_exit": "import sys\ntry:\n    sys.exit(1)\nexcept SystemExit:\n    pass",
    "recursion": "def f(n):\n    return n and f(n - 1)\nassert f(900) == 0",
    "big_list": "assert sum(range(10 ** 6)) == 499999500000",
    "eval_exec": "assert eval('1 + 1') == 2\nexec('x = 3')\nassert x == 3",
    "random_and_time": "import random, time\nrandom.seed(0)\nassert 0 <= random.random() < 1 and time.time() > 0",
    "signal_handler": """
import signal, time
hits = []
signal.signal(signal.SIGALRM, lambda *a: hits.append(1))
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.05)
assert hits
""",
    "doctest": "import doctest\ndef f():\n    '>>> 1'\nassert doctest.testmod().failed == 0",
    "integer_of_c": "import ctypes\nassert ctypes.c_int32(1 << 31).value == -(1 << 31)",
    "objects_of_the_collector": "import gc\nassert gc.get_objects()",
    "profiler": "import cProfile\nassert cProfile.Profile().runcall(len, [1]) == 1",
    "pool_of_threads": """
from concurrent.futures import ThreadPoolExecutor
import threading
barrier = threading.Barrier(32)
with ThreadPoolExecutor(32) as pool:
    assert len(list(pool.map(lambda _: barrier.wait(), range(32)))) == 32
""",
    "zone": """
import datetime, zoneinfo
assert zoneinfo.ZoneInfo('Europe/Paris').utcoffset(datetime.datetime(2024, 7, 1)).seconds == 7200
""",
    "help": "help(len)",
    "file_copied": """
import shutil
with open('a', 'w') as file:
    file.write('x')
shutil.copyfile('a', 'b')
assert open('b').read() == 'x'
""",
    "ends_with_comment": "assert True\n# the end",
    "empty": "",
}
