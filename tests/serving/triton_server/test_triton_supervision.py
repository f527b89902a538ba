"""A model's killed or hung process and a killed server are noticed, healed and counted, and leave nothing behind."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from endpoint_server import wait_until
from triton_running import describe, find_triton, left_in_shared_memory, save_models, triton

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    with triton(tmp_path_factory.mktemp("triton"), ("score",)) as (process, supervisor):
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        yield process, supervisor
        supervisor.stop()
        thread.join(60)


@contextmanager
def times_of_readiness(supervisor, name):
    """(Seconds since the start, Triton's own word on readiness) at each change."""
    found, ends, began = [], threading.Event(), time.monotonic()

    def look():
        while not ends.wait(0.02):
            is_ready = supervisor._is_ready(name)
            if not found or found[-1][1] != is_ready:
                found.append((time.monotonic() - began, is_ready))

    thread = threading.Thread(target=look)
    thread.start()
    yield found
    ends.set()
    thread.join()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_hung_process_is_seen_within_five_seconds_and_comes_back(watched, number):
    process, supervisor = watched
    supervisor.probe_every_s, supervisor.probe_timeout_s = 1.0, 2.0
    before, memory = supervisor.restarts["score"], len(left_in_shared_memory(process))
    stub = process.stubs()["score"]
    with times_of_readiness(supervisor, "score") as found:
        os.kill(stub, number)
        wait_until(lambda: supervisor.restarts["score"] == before + 1, seconds=5)
        wait_until(lambda: supervisor._stubs["score"] != stub, seconds=60)
        wait_until(lambda: bool(found) and found[-1][1])  # the reader looks fifty times per second
    refused = [seconds for seconds, is_ready in found if not is_ready]
    assert refused and min(refused) < 5 and found[-1][1]
    assert supervisor.probe("score") is None
    # The server does not always reap a killed child; `_group` leaves zombies out.
    assert stub not in process._group() and list(process.stubs()) == ["score"]
    wait_until(lambda: len(left_in_shared_memory(process)) <= memory)
    with urllib.request.urlopen(f"http://127.0.0.1:{process.listening.metrics_port}/metrics") as answer:
        assert f'deepseek_moe_model_restarts{{model="score"}} {before + 1}' in answer.read().decode()


def test_a_killed_server_comes_back(watched):
    process, supervisor = watched
    old, stub = process.pid, process.stubs()["score"]
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: supervisor.restarts["server"] == 1, seconds=5)
    wait_until(lambda: process.pid != old and supervisor._stubs.get("score") not in (None, stub), seconds=100)
    assert supervisor.probe("score") is None
    assert not os.path.exists(f"/proc/{stub}")


def test_the_command_from_start_to_sigterm(tmp_path):
    """It says where it listens and that it ends; nothing is left."""
    find_triton()
    model, _ = save_models(tmp_path)
    words = ["serve", str(model), "--engine", "triton", "--kinds", "score", "--grace", "3"]
    ports = ["--port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    command = [sys.executable, "-m", "deepseek_cli.main", *words, *ports]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            assert said.startswith("serving score by Triton at http://127.0.0.1:"), server.stderr.read()
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 143
            told = server.stderr.read()
            assert "interrupted; brought back: nothing" in told and "Traceback" not in told
            assert not list(Path("/dev/shm").glob(f"*deepseek_moe_{server.pid}_*"))
            with socket.socket() as one:  # nobody listens any more
                assert one.connect_ex(("127.0.0.1", int(re.search(r":(\d+)", said)[1]))) != 0
        finally:
            server.kill()


def test_a_taken_port_is_one_line(tmp_path):
    from deepseek_serving.triton_server.ports import Listening, find_free_ports
    from deepseek_serving.triton_server.process import TritonProcess
    from deepseek_serving.triton_server.repository import BatchingSettings, write_repository

    repository = write_repository(tmp_path / "repository", describe(tmp_path, ["score"]), BatchingSettings())
    first = TritonProcess(find_triton(), repository, Listening(*find_free_ports(3)))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first.listening.grpc_port))
        taken.listen()
        with pytest.raises(ValueError, match=r"--port: got .*, which cannot be taken"):
            first.start()
