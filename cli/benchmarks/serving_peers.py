"""Starts each server that is compared, and asks it: ours, Triton with and without batching, and others.

`serving.py` calls it. A server that is not installed here is told by `AbsentError`, with what would bring it.
"""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepseek_cli.benchmarks.serving_load import Answer
from deepseek_records.exit_codes import RunFailedError
from deepseek_serving.triton_server.installation import find_installation
from deepseek_serving.triton_server.ports import find_free_ports

VLLM_VARIABLE = "DEEPSEEK_MOE_VLLM"
_VLLM = Path("build", "serving", "vllm")
_START_S = 300.0
Ask = Callable[[str], Answer]


class AbsentError(Exception):
    """A server is not installed here."""


@contextmanager
def endpoint(model: str, max_tokens: int) -> Iterator[Ask]:
    """Run `deepseek-moe serve` and yield what asks it.

    Args:
        model: A checkpoint.
        max_tokens: Of an answer.
    """
    words = [model, "--port", "0", "--name", "model", "--max-tokens", str(max_tokens), "--max-running", "64"]
    with _child([sys.executable, "-m", "deepseek_cli.main", "serve", *words]) as process:
        port = _read_port(process, r"http://127\.0\.0\.1:(\d+)/v1")
        yield lambda prompt: ask_openai(port, "model", max_tokens, prompt)


@contextmanager
def triton(model: str, max_tokens: int, *, kind: str, max_batch: int = 32) -> Iterator[Ask]:
    """Run `deepseek-moe serve --engine triton` with one model of it.

    Args:
        model: A checkpoint.
        max_tokens: Of a generated answer.
        kind: `score` or `generate`.
        max_batch: Requests in one execution; 1 is without dynamic batching.

    Raises:
        AbsentError: Triton is not installed.
    """
    try:
        find_installation()
    except ValueError as error:
        raise AbsentError(str(error)) from None
    words = [model, "--engine", "triton", "--kinds", kind, "--max-batch", str(max_batch), "--grace", "3"]
    words += ["--no-queue-limit", "--max-running", "64", "--port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    with _child([sys.executable, "-m", "deepseek_cli.main", "serve", *words]) as process:
        port = _read_port(process, r"http://127\.0\.0\.1:(\d+)")
        asks = {
            "score": lambda text: ask_score(port, text),
            "generate": lambda text: ask_triton(port, max_tokens, text),
        }
        yield asks[kind]


@contextmanager
def transformers_serve(model: str, max_tokens: int) -> Iterator[Ask]:
    """Run `transformers serve`, which has no continuous batching for MLA.

    Args:
        model: A checkpoint of a class that transformers has.
        max_tokens: Of an answer.
    """
    (port,) = find_free_ports(1)
    words = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with _child([sys.executable, "-m", "transformers.cli.transformers", *words]) as process:
        _wait_for_port(process, port, "transformers serve")
        yield lambda prompt: ask_openai(port, model, max_tokens, prompt)


@contextmanager
def vllm(model: str, max_tokens: int) -> Iterator[Ask]:
    """Run vLLM's own server on the CPU and yield what asks it.

    Args:
        model: A DeepSeek-V3 checkpoint with latents of 512 and rotated keys of 64.
        max_tokens: Of an answer.

    Raises:
        AbsentError: vLLM is not installed.
    """
    with vllm_server(model) as port:
        yield lambda prompt: ask_openai(port, "model", max_tokens, prompt)


@contextmanager
def vllm_server(model: str) -> Iterator[int]:
    """Run vLLM's own server on the CPU, under the conditions that its text can be compared, and yield its port.

    Args:
        model: As of `vllm`.

    Raises:
        AbsentError: vLLM is not installed.
    """
    (port,) = find_free_ports(1)
    words = [
        "--model",
        model,
        "--served-model-name",
        "model",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
    ]
    words += ["--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "64", "--no-enable-prefix-caching"]
    words += ["--compilation-config", json.dumps({"custom_ops": ["none"]})]
    command = [str(find_vllm()), "-m", "vllm.entrypoints.openai.api_server", *words]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with _child(command, settings) as process:
        _wait_for_port(process, port, "vLLM")
        yield port


def find_vllm() -> Path:
    """Return the Python of vLLM's environment.

    Raises:
        AbsentError: There is none.
    """
    python = Path(os.environ.get(VLLM_VARIABLE, _VLLM)) / "bin" / "python"
    if not python.exists():
        raise AbsentError(f"vLLM is not installed in {python.parents[1]}; make serve-setup-vllm brings it")
    return python.absolute()


def ask_openai(port: int, model: str, max_tokens: int, prompt: str) -> Answer:
    """Ask a server with OpenAI's protocol for greedy text.

    Args:
        port: Of this machine.
        model: Its name there.
        max_tokens: Of the answer.
        prompt: What is continued.
    """
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    told, seconds = _post(port, "/v1/completions", body)
    return Answer(told["choices"][0]["text"], told["usage"]["completion_tokens"], seconds)


def ask_triton(port: int, max_tokens: int, prompt: str) -> Answer:
    """Ask Triton for greedy text.

    Args:
        port: Of this machine.
        max_tokens: Of the answer.
        prompt: What is continued.
    """
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    told, seconds = _post(port, "/v2/models/generate/generate", body)
    return Answer(told["text"], told["completion_tokens"], seconds)


def ask_score(port: int, text: str) -> Answer:
    """Ask Triton for a text's log-likelihood.

    Args:
        port: Of this machine.
        text: What is scored.
    """
    body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]}
    told, seconds = _post(port, "/v2/models/score/infer", body)
    found = {output["name"]: output["data"][0] for output in told["outputs"]}
    return Answer(float(found["log_likelihood"]), int(found["num_tokens"]), seconds)


def _post(port: int, path: str, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    told = json.loads(answer.read())
    connection.close()
    if answer.status != 200:
        raise RunFailedError(f"bench serving: {path} answered {answer.status} ({str(told)[:200]})")
    return told, time.perf_counter() - began


@contextmanager
def _child(command: list[str], settings: dict[str, str] | None = None) -> Iterator["subprocess.Popen[str]"]:
    environment = os.environ | (settings or {})
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):  # vLLM leaves its engine behind
                os.killpg(process.pid, signal.SIGKILL)


def _read_port(process: "subprocess.Popen[str]", pattern: str) -> int:
    assert process.stdout is not None
    said = re.search(pattern, process.stdout.readline())
    if said is None:
        raise RunFailedError("bench serving: the server did not start; deepseek-moe serve with this model says why")
    return int(said[1])


def _wait_for_port(process: "subprocess.Popen[str]", port: int, name: str) -> None:
    ends = time.monotonic() + _START_S
    while time.monotonic() < ends and process.poll() is None:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            connection.getresponse().read()
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise RunFailedError(f"bench serving: {name} did not start")
