"""None of the hostile programs passes or does harm, and the honest ones beside them pass."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile_programs as programs
import psutil
import pytest

from deepseek_eval.sandbox import client as sandbox

# One worker, because all tests of this file look at one run of all programs.
pytestmark = pytest.mark.xdist_group("sandbox")
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def outcomes():
    """All programs, run side by side with honest neighbors between them, and what the host looked like after."""
    before = {process.pid for process in psutil.process_iter()}
    neighbor = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    names, sources = [], []
    honest = list(programs.HONEST.items())
    for index, (name, source) in enumerate(programs.HOSTILE.items()):
        names += [name, f"honest:{index}:{honest[index % len(honest)][0]}"]
        sources += [source, honest[index % len(honest)][1]]
    results = dict(zip(names, sandbox.run_programs(sources, timeout_s=TIMEOUT_S, num_workers=2), strict=True))
    neighbor_lives = neighbor.poll() is None
    neighbor.kill()
    neighbor.wait()
    return results, before, neighbor_lives


def test_the_suite_is_large_enough():
    assert len(programs.HOSTILE) >= 40


@pytest.mark.parametrize("name", programs.HOSTILE)
def test_hostile_program_does_not_pass(outcomes, name):
    result = outcomes[0][name]
    assert not result.passed, result
    # Failing must be the program's doing, not a defect of the sandbox.
    assert not result.reason.startswith("sandbox"), result


def test_honest_neighbors_pass(outcomes):
    failures = {name: r.reason for name, r in outcomes[0].items() if name.startswith("honest:") and not r.passed}
    assert not failures


def test_nothing_is_left_behind(outcomes):
    _, before, neighbor_lives = outcomes
    assert neighbor_lives
    # A server's programs run as a user of their own; other test workers have servers of theirs.
    users = {1_900_000_000 + server.pid for server in psutil.Process().children(recursive=True)}
    assert not [p for p in psutil.process_iter() if p.pid not in before and p.uids().real in users]
    places = (Path("/"), Path("/etc"), Path("/var/tmp"), Path("/dev/shm"), Path.home(), Path(os.__file__).parent)
    assert not [place for place in places if (place / "deepseek-moe-was-here").exists()]


def test_a_program_finds_nothing_of_its_predecessor():
    server = sandbox.ProgramServer()
    try:
        request = {"timeout_s": 3.0, "as_main": False}
        leave = (
            "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('answer')\nos.chmod('a', 0)\nos.symlink('/', 'r')"
        )
        assert server.run({"source": leave, **request}).passed
        assert server.run({"source": "import os\nassert os.listdir('.') == []", **request}).passed
    finally:
        server.close()


LEAVES = {
    "a file": "open('x', 'w').write('answer')",
    "a mode": "import os\nos.fchmod(os.open('.', os.O_RDONLY), 0)",
    "an attribute": "import os\nos.setxattr(os.open('.', os.O_RDONLY), 'user.note', b'answer')",
    "times": "import os\nos.utime(os.open('.', os.O_RDONLY), (1, 1))",
    "a deep folder": "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')\nopen('x', 'w').close()",
    "a folder of long names": "import os\nfor n in range(60):\n    os.mkdir('d' * 250)\n    os.chdir('d' * 250)",
}
SUCCESSOR = """
import os, time
status = os.stat('.')
assert os.listdir('.') == [] and status.st_mode & 0o777 == 0o700 and os.listxattr('.') == []
assert abs(time.time() - status.st_mtime) < 60 and abs(time.time() - status.st_atime) < 60
open('mine', 'w').close()
"""


@pytest.mark.parametrize("without", [(), ("namespaces",)], ids=["namespaces", "without"])
def test_mode_attributes_and_times_of_the_folder_are_fresh(without):
    server = sandbox.ProgramServer(without)
    request = {"timeout_s": 10.0, "as_main": False}
    try:
        for name, source in LEAVES.items():
            server.run({"source": source, **request})
            result = server.run({"source": SUCCESSOR, **request})
            assert result.passed, (name, result)
        left = [path for path in Path(server.folder).iterdir()] if without else []
        assert not left
    finally:
        server.close()


def test_locks_of_multiprocessing_work_in_a_root_of_ones_own():
    source = (
        "import multiprocessing as m\nwith m.Lock(), m.Pool(2) as pool:\n    assert pool.map(abs, [-1, 2]) == [1, 2]"
    )
    result = sandbox.run_program(source, timeout_s=10.0)
    assert result.passed, result


@pytest.fixture(scope="module")
def server_without_namespaces():
    server = sandbox.ProgramServer(("namespaces",))
    yield server
    server.close()


@pytest.mark.parametrize("name", programs.REACH_WITHOUT_NAMESPACES)
def test_promises_hold_without_namespaces(name, server_without_namespaces):
    result = server_without_namespaces.run({"source": programs.REACH_WITHOUT_NAMESPACES[name], "timeout_s": 5.0})
    assert not result.passed and not result.reason.startswith("sandbox"), result
    result = server_without_namespaces.run({"source": programs.HONEST["temporary_file"], "timeout_s": 5.0})
    assert result.passed, result


# What a machine may forbid, and what then must still hold.
LESS_STILL = [("namespaces", "landlock"), ("namespaces", "seccomp"), ("landlock",), ("seccomp",)]
WEAKER = [("namespaces",), *(pytest.param(names, marks=pytest.mark.slow) for names in LESS_STILL)]


@pytest.mark.parametrize("without", WEAKER, ids="-".join)
def test_weaker_machines_are_named_and_never_fooled(without):
    server = sandbox.ProgramServer(without)
    try:
        layers = " ".join(server.layers.values()).lower()
        for name in without:
            assert name.rstrip("s") not in layers
        if without == ("namespaces",):
            assert set(sandbox.MINIMUM) <= set(server.layers)
        if "namespaces" in without and len(without) > 1:
            assert not set(sandbox.MINIMUM) <= set(server.layers)
        names = [
            "os_exit",
            "sys_exit",
            "fake_the_end_message",
            "fake_the_end_from_a_signal",
            "shout_success_on_all_handles",
        ]
        for name in names:
            assert not server.run({"source": programs.VERDICT[name], "timeout_s": 2.0}).passed
        for name in ("arithmetic", "threads", "temporary_file", "child_that_exits"):
            result = server.run({"source": programs.HONEST[name], "timeout_s": 5.0})
            assert result.passed, result
    finally:
        server.close()


@pytest.mark.slow
def test_all_hostile_programs_fail_without_namespaces_too():
    """The fallback of a machine that forbids namespaces: Landlock, seccomp and limits alone."""
    server = sandbox.ProgramServer(("namespaces",))
    try:
        for name, source in programs.HOSTILE.items():
            result = server.run({"source": source, "timeout_s": TIMEOUT_S})
            assert not result.passed, (name, result)
        for name, source in programs.HONEST.items():
            result = server.run({"source": source, "timeout_s": 5.0})
            assert result.passed, (name, result)
    finally:
        server.close()


@pytest.mark.parametrize("prefix", [(), ("unshare", "-r")], ids=["user", "root of a user namespace"])
def test_an_unprivileged_user_is_protected_as_well(prefix):
    """The server as an ordinary user or a rootless container sees it, under an interpreter such a user may read."""
    system_python = Path("/usr/bin/python3")
    if os.getuid() != 0 or not system_python.exists():
        pytest.skip("needs root, to become another user, and a system interpreter")
    # `deepseek_eval` needs torch; the sandbox itself does not, so it is loaded by path.
    code = """
import json, sys, types
for name in ("deepseek_eval", "deepseek_eval.sandbox"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [sys.argv[1]]
from deepseek_eval.sandbox import client as sandbox
sources = json.loads(sys.stdin.read())
print(json.dumps([sandbox.describe_protection(), [r.passed for r in sandbox.run_programs(sources, timeout_s=1.0)]]))
"""
    import json

    hostile = ["os_exit", "fake_the_end_message", "type_of_its_own", "fork_bomb_that_lives", "read_passwd"]
    hostile += ["tcp_socket", "become_root", "new_namespace"]
    sources = [programs.HOSTILE[name] for name in hostile] + list(programs.HONEST.values())
    done = subprocess.run(
        [*prefix, str(system_python), "-c", code, str(Path(sandbox.__file__).parent)],
        input=json.dumps(sources),
        capture_output=True,
        text=True,
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        env={},
        check=False,
    )
    if prefix and "Operation not permitted" in done.stderr:
        pytest.skip("no user namespaces here")
    assert done.returncode == 0, done.stderr
    layers, passed = json.loads(done.stdout)
    assert set(sandbox.MINIMUM) <= set(layers)
    assert passed == [False] * len(hostile) + [True] * len(programs.HONEST)


def test_less_than_the_minimum_needs_a_flag(monkeypatch):
    pool = sandbox._Pool()
    pool._layers, pool.notes = {"limits": "rlimits", "end": "x"}, ["namespaces: not permitted"]
    monkeypatch.setattr(sandbox, "_POOL", pool)
    with pytest.raises(ValueError, match=r"no protection for network, files, processes .*not permitted"):
        sandbox.run_program("pass")
    assert sandbox.run_program("pass", allow_weak_sandbox=True).passed
    pool.close()


def test_a_killed_server_costs_one_program_only():
    server = sandbox.ProgramServer()
    pool = sandbox._Pool()
    pool.idle.put(server)
    with ThreadPoolExecutor(1) as executor:
        running = executor.submit(pool.run, {"source": "import time\ntime.sleep(5)", "timeout_s": 10.0})
        time.sleep(0.5)
        os.kill(server.process.pid, signal.SIGKILL)
        assert not running.result().passed
    assert pool.run({"source": "assert True", "timeout_s": 3.0}).passed
    pool.close()


@pytest.mark.parametrize(
    "settings",
    [
        *({"timeout_s": seconds} for seconds in (0, -1.0, float("inf"), float("nan"))),
        {"num_workers": 0},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    for run, sources in ((sandbox.run_programs, ["pass"]), (sandbox.run_tests, [("pass", "pass")])):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}: got .*, expected") as caught:
            list(run(sources, **settings))
        assert "\n" not in str(caught.value)
