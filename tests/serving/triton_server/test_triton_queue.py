"""Without a limit on its queue Triton keeps nobody waiting for half a second."""

import time

import pytest
from triton_running import triton, triton_client

from deepseek_serving.triton_server.repository import BatchingSettings

pytestmark = [pytest.mark.serving, pytest.mark.timeout(600)]


def test_one_text_after_another_is_never_held_back(tmp_path):
    """With a limit about one request in twenty waits for 500 ms or more in Triton's queue."""
    triton_client("grpc")
    body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["What is a lymph node?"]}]}
    with triton(tmp_path, ("score",), batching=BatchingSettings(max_waiting=None)) as (process, _):
        seconds = []
        for _ in range(200):
            began = time.perf_counter()
            assert process.ask("POST", "/v2/models/score/infer", body)["outputs"]
            seconds.append(time.perf_counter() - began)
        stats = process.ask("GET", "/v2/models/score/stats")["model_stats"][0]["inference_stats"]["queue"]
    assert stats["ns"] / stats["count"] < 12e6, "more than the 5 ms that a batch waits for others"
    assert sum(one > 0.4 for one in seconds) <= 1, sorted(seconds)[-5:]
