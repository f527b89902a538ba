"""Readers that go, a full queue, the time limit, a dead model, and the end: nothing is lost without an answer."""

import http.client
import io
import json
import logging
import resource
import ssl
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from certificates import make_certificate
from endpoint_server import make_model, serving, wait_until


@contextmanager
def slow_server(seconds=0.02, **options):
    """A server whose every batch takes at least this long."""
    model = make_model("ours")
    hook = model.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    try:
        with serving(model, **options) as running:
            yield running
    finally:
        hook.remove()


def open_request(running, **fields):
    """A connection on which a request was sent."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 60, "temperature": 0} | fields
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def ask(running, **fields):
    """Status and JSON."""
    connection = open_request(running, **fields)
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def test_the_work_of_a_reader_who_has_gone_stops():
    with slow_server() as running:
        for number, stream in enumerate((True, False), start=1):
            connection = open_request(running, stream=stream)
            if stream:
                assert connection.getresponse().readline().startswith(b"data: {")
            wait_until(lambda: running.engine.num_running == 1)
            connection.close()
            wait_until(lambda: running.engine.num_live == running.engine.num_running == 0, seconds=2)
            wait_until(lambda number=number: running.value("disconnected_total") == number, seconds=2)
        assert running.value("generated_tokens_total") < 60
        assert ask(running, max_tokens=1)[0] == 200


def test_a_full_queue_refuses_at_once_and_everything_is_counted():
    with slow_server(max_running=2, max_waiting=2) as running, ThreadPoolExecutor(12) as pool:
        started = time.monotonic()
        answers = list(pool.map(lambda _: (ask(running, max_tokens=30), time.monotonic() - started), range(12)))
        taken = [answer for (status, answer), _ in answers if status == 200]
        refused = [(answer, seconds) for (status, answer), seconds in answers if status == 503]
        assert len(taken) + len(refused) == 12 and 4 <= len(taken) < 12
        assert all(answer["error"]["code"] == "queue_full" for answer, _ in refused)
        assert min(seconds for _, seconds in refused) < 0.5  # one answer takes 0.6 s at least
        assert len({answer["choices"][0]["text"] for answer in taken}) == 1
        path = "/v1/completions"
        wait_until(lambda: running.value("requests_total", path=path, status="200") == len(taken))
        wait_until(lambda: running.value("requests_total", path=path, status="503") == len(refused))
        assert running.value("refused_total", reason="queue_full") == len(refused)


def test_the_time_limit_answers_and_stops_the_work():
    with slow_server(timeout_s=0.2) as running:
        status, told = ask(running)
        assert (status, told["error"]["code"]) == (504, "timeout")
        wait_until(lambda: running.engine.num_running == 0, seconds=2)


@pytest.mark.parametrize(("grace_s", "status"), [(20.0, 200), (0.1, 503)])
def test_the_end_finishes_what_runs_within_the_grace_time(grace_s, status):
    with slow_server(0.01, grace_s=grace_s) as running, ThreadPoolExecutor(1) as pool:
        last = pool.submit(ask, running)
        wait_until(lambda: running.engine.num_running == 1)
        running.server._loop.call_soon_threadsafe(running.server.begin_end)
        got, told = last.result(timeout=30)
        assert got == status
        assert status == 503 or told["usage"]["completion_tokens"] > 40
        running.thread.join(10)
        with pytest.raises(ConnectionRefusedError):
            ask(running)


def test_a_dead_model_answers_everybody_and_ends_the_server():
    with slow_server() as running, ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(ask, running) for _ in range(2)]
        wait_until(lambda: running.engine.num_running == 2)
        running.engine.model.register_forward_pre_hook(fail)
        assert {answer.result(timeout=30)[0] for answer in answers} == {500}
        running.thread.join(10)
        assert not running.thread.is_alive() and running.engine.failure == "RuntimeError"


def fail(*_):
    raise RuntimeError("planted")


def get(running, path, **headers):
    """Status of a GET."""
    connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
    connection.request("GET", path, headers=headers)
    return connection.getresponse().status


def test_a_key_is_asked_for_and_a_foreign_host_refused():
    model = make_model("ours")
    with serving(model, api_key="k" * 20) as running:
        key = {"Authorization": f"Bearer {'k' * 20}"}
        assert get(running, "/health") == 200
        assert get(running, "/v1/models") == get(running, "/metrics") == 401
        assert get(running, "/v1/models", Authorization="Bearer wrong") == 401
        assert get(running, "/v1/models", **key) == get(running, "/v1/models", Host="example.com", **key) == 200
        running.server.config.app.api_key = None
        for host in ("localhost:1", "127.0.0.1", "[::1]:80", "[::1]"):
            assert get(running, "/v1/models", Host=host) == 200, host
        for host in ("example.com", "example.com:80", "127.0.0.1.example.com", ""):
            assert get(running, "/v1/models", Host=host) == 403, host
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


def test_tls_answers_who_trusts_the_certificate_and_nobody_in_plain_text(tmp_path):
    certificate, key = make_certificate(tmp_path)
    with serving(make_model("ours"), tls=(str(certificate), str(key))) as running:
        with urllib.request.urlopen(
            f"{running.url}/health", context=ssl.create_default_context(cafile=certificate)
        ) as told:
            assert json.load(told) == {"status": "ok"}
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{running.url}/health")
        with pytest.raises((OSError, http.client.HTTPException)):
            urllib.request.urlopen(running.url.replace("https", "http"), timeout=10)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_requests_leave_memory_flat():
    """Of each ten one hangs up and one is refused; all are counted, on both sides."""
    with serving(make_model("ours")) as running, ThreadPoolExecutor(16) as pool:

        def one(number):
            if number % 10 == 0:
                connection = open_request(running, stream=True)
                connection.getresponse().readline()
                connection.close()
                return "gone"
            return ask(running, max_tokens=0 if number % 10 == 1 else 4, prompt=f"number {number}")[0]

        before = 0
        counts = dict.fromkeys((200, 400, "gone"), 0)
        for start in range(0, 12000, 2000):  # the first 2,000 warm up
            for outcome in pool.map(one, range(start, start + 2000)):
                counts[outcome] += 1
            before = before or resident_bytes()
        wait_until(lambda: running.engine.num_live == running.engine.num_running == 0)
        assert counts == {200: 9600, 400: 1200, "gone": 1200}
        path = "/v1/completions"
        wait_until(lambda: running.value("requests_total", path=path, status="200") == 9600 + 1200)
        assert running.value("requests_total", path=path, status="400") == 1200
        assert resident_bytes() < 1.03 * before


def resident_bytes():
    """Of this process, the server's and the clients' alike."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def test_a_server_leaves_the_log_handlers_of_the_process_open():
    """Whoever serves from a program of their own keeps the log, and a handler that owns a stream keeps that."""

    class Owning(logging.StreamHandler):
        def close(self):
            self.stream.close()
            super().close()

    handler = Owning(io.StringIO())
    logging.getLogger("of_the_program").addHandler(handler)
    try:
        with serving(make_model("ours")) as running:
            assert open_request(running, max_tokens=1).getresponse().status == 200
        assert not handler.stream.closed
    finally:
        logging.getLogger("of_the_program").removeHandler(handler)
