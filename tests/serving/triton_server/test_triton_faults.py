"""Full queues, readers that go, a killed model, an end in order, a key and TLS: nothing is lost without an answer."""

import http.client
import json
import os
import re
import signal
import threading
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from certificates import make_certificate
from endpoint_server import make_model, wait_until
from test_triton_answers import generation_inputs, greedy, infer_body, log_likelihood, strings
from triton_running import triton, triton_client

from deepseek_serving.triton_server.process import API_KEY_HEADER, TritonRefusedError
from deepseek_serving.triton_server.repository import BatchingSettings

pytestmark = [pytest.mark.serving, pytest.mark.timeout(900)]
GENERATE = "/v2/models/generate/generate"


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    batching = BatchingSettings(max_batch=2, max_waiting=4)
    with triton(tmp_path_factory.mktemp("triton"), ("score", "generate"), batching=batching) as (process, supervisor):
        thread = threading.Thread(target=supervisor.run)
        thread.start()
        yield process, supervisor
        supervisor.stop()
        thread.join(60)


@pytest.fixture
def running(watched):
    return watched[0]


def ask(running, path, body):
    """Status and seconds of one request; 0 where the connection broke, "late" where no answer came."""
    began = time.monotonic()
    try:
        running.ask("POST", path, body, timeout_s=60)
        status = 200
    except TritonRefusedError as error:
        status = error.status
    except TimeoutError:
        status = "late"
    except OSError:
        status = 0
    return status, time.monotonic() - began


def value(running, name, model):
    """A sum over Triton's own counters of one model."""
    with urllib.request.urlopen(f"http://127.0.0.1:{running.listening.metrics_port}/metrics") as answer:
        page = answer.read().decode()
    lines = re.findall(rf'^{name}\{{[^}}]*model="{model}"[^}}]*\}} (\S+)$', page, re.MULTILINE)
    return sum(map(float, lines))


def test_a_full_queue_refuses_at_once_and_both_sides_count_the_same(watched):
    running, supervisor = watched
    supervisor.probe_every_s = 1e6  # its own questions would be counted, too
    for name, path, body in (
        ("score", "/v2/models/score/infer", infer_body(["some words to score " * 5])),
        ("generate", GENERATE, {"prompt": "abc", "max_tokens": 100, "temperature": 0}),
    ):
        counter = "nv_inference_request_success"
        before = value(running, counter, name)
        with ThreadPoolExecutor(48) as pool:
            found = list(pool.map(lambda _, path=path, body=body: ask(running, path, body), range(96)))
        statuses = Counter(status for status, _ in found)
        # Over HTTP, Triton gives every refusal of a decoupled model the status 400.
        refusal = 503 if name == "score" else 400
        assert set(statuses) == {200, refusal} and statuses.total() == 96, (name, statuses)
        assert min(seconds for status, seconds in found if status == refusal) < 0.5
        if name == "score":  # what Triton's queue refuses, it does not count
            assert value(running, counter, name) - before == statuses[200]
    supervisor.probe_every_s = 10.0


def test_the_work_of_readers_who_have_gone_stops(running):
    """All 16 places are taken by streams; once their readers are gone there is room at once."""
    body = json.dumps({"prompt": "abc", "max_tokens": 200, "temperature": 0, "stream": True})
    connections = []
    for _ in range(16):
        connection = http.client.HTTPConnection("127.0.0.1", running.listening.http_port, timeout=60)
        connection.request("POST", f"{GENERATE}_stream", body)
        connections.append(connection)
    wait_until(lambda: running.count_live("generate") == 16, seconds=5)
    assert ask(running, GENERATE, {"prompt": "a", "max_tokens": 1})[0] == 400
    for connection in connections:
        connection.close()
    wait_until(lambda: running.count_live("generate") == 0, seconds=3)
    module = triton_client("grpc")
    with module.InferenceServerClient(f"127.0.0.1:{running.listening.grpc_port}") as client:
        client.start_stream(lambda result, error: None)
        for _ in range(16):
            client.async_stream_infer("generate", generation_inputs(module, "abc", max_tokens=200, stream=True))
        wait_until(lambda: running.count_live("generate") == 16, seconds=5)
        client.stop_stream(cancel_requests=True)
    wait_until(lambda: running.count_live("generate") == 0, seconds=3)
    assert ask(running, GENERATE, {"prompt": "a", "max_tokens": 1})[0] == 200


def test_a_model_killed_under_load_answers_everybody_and_comes_back(watched):
    running, supervisor = watched
    stubs, before = running.stubs(), dict(supervisor.restarts)

    def one(number):
        if number == 40:
            for stub in stubs.values():
                os.kill(stub, signal.SIGKILL)
        if number % 2:
            return ask(running, "/v2/models/score/infer", infer_body(["abc"]))[0]
        return ask(running, GENERATE, {"prompt": "abc", "max_tokens": 20})[0]

    with ThreadPoolExecutor(4) as pool:
        statuses = Counter(pool.map(one, range(120)))
    # None waits until its client gives up: a connection that breaks is an answer, after 60 s it is not.
    assert statuses[200] >= 30 and statuses["late"] == 0, statuses
    wait_until(lambda: sum(supervisor.restarts.values()) > sum(before.values()), seconds=5)
    wait_until(lambda: ask(running, "/v2/models/score/infer", infer_body(["abc"]))[0] == 200, seconds=200)
    wait_until(lambda: ask(running, GENERATE, {"prompt": "abc", "max_tokens": 2})[0] == 200, seconds=200)
    assert running.stubs().keys() == stubs.keys() and not set(running.stubs().values()) & set(stubs.values())


def test_the_end_finishes_what_runs_and_refuses_the_rest(tmp_path):
    with triton(tmp_path, ("generate",), grace_s=20.0) as (running, _), ThreadPoolExecutor(1) as pool:
        text, num_tokens = greedy(make_model("ours"), "The King", 200)
        body = {"prompt": "The King", "max_tokens": 200, "temperature": 0}
        last = pool.submit(running.ask, "POST", GENERATE, body)
        time.sleep(0.3)
        running._process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        late = None if last.done() else ask(running, GENERATE, {"prompt": "a", "max_tokens": 1})[0]
        told = last.result(timeout=30)
        assert (told["text"], told["completion_tokens"]) == (text, num_tokens)
        assert late in (None, 0, 400, 503)  # none: the answer was quicker than the signal
        running._process.wait(30)


def test_a_key_and_tls(tmp_path):
    """gRPC is encrypted and asks for the key; HTTP, which stays on this machine, asks for it, too."""
    module, utils = triton_client("grpc"), triton_client("utils")
    tls = make_certificate(tmp_path)
    with triton(tmp_path, ("score",), api_key="k" * 20, tls=tls) as (running, _):
        address, inputs = f"127.0.0.1:{running.listening.grpc_port}", [strings(module, "text", ["abc"])]
        with pytest.raises(utils.InferenceServerException), module.InferenceServerClient(address) as client:
            client.infer("score", inputs, client_timeout=5)
        with module.InferenceServerClient(address, ssl=True, root_certificates=str(tls[0])) as client:
            with pytest.raises(utils.InferenceServerException, match="restricted"):
                client.infer("score", inputs)
            with pytest.raises(utils.InferenceServerException, match="restricted"):
                client.infer("score", inputs, headers={f"triton-grpc-protocol-{API_KEY_HEADER}": "wrong"})
            told = client.infer("score", inputs, headers={f"triton-grpc-protocol-{API_KEY_HEADER}": "k" * 20})
        assert np.isclose(told.as_numpy("log_likelihood")[0, 0], log_likelihood(make_model("ours"), "abc"), atol=1e-4)
        assert running.ask("POST", "/v2/models/score/infer", infer_body(["abc"]))["outputs"]
        connection = http.client.HTTPConnection("127.0.0.1", running.listening.http_port, timeout=30)
        connection.request("POST", "/v2/models/score/infer", json.dumps(infer_body(["abc"])))
        assert connection.getresponse().status == 403


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_flat(tmp_path):
    """Half are scored, half generated; of each ten one is refused; memory is that of all of the server's processes."""
    with triton(tmp_path, ("score", "generate")) as (running, _), ThreadPoolExecutor(8) as pool:

        def one(number):
            is_bad = number % 10 == 9
            if number % 2:
                text = "" if is_bad else f"number {number}"
                return ask(running, "/v2/models/score/infer", infer_body([text]))[0]
            return ask(running, GENERATE, {"prompt": f"number {number}", "max_tokens": 4})[0]

        before, statuses = 0, Counter()
        for start in range(0, 12000, 2000):  # the first 2,000 warm up
            statuses.update(pool.map(one, range(start, start + 2000)))
            before = before or resident_bytes(running)
        assert statuses == {200: 10800, 400: 1200}
        assert resident_bytes(running) < 1.03 * before


def resident_bytes(running):
    """Of the server and its models' processes."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in running._group()]
    return sum(pages) * os.sysconf("SC_PAGESIZE")
