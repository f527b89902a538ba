"""`deepseek-moe serve` as a command: what it says, what it refuses, and how it ends on SIGTERM."""

import http.client
import json
import re
import shlex
import signal
import subprocess
import sys

import pytest
from endpoint_server import make_model, make_tokenizer

from deepseek_cli import serve
from deepseek_cli.main import main

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    make_model("ours").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_from_start_to_sigterm(checkpoint, tmp_path, capsys):
    """The first printed example, on a free port; a stream that runs at the signal is finished."""
    words = shlex.split(serve.EXAMPLES.strip().splitlines()[0])
    assert words[:2] == ["deepseek-moe", "serve"]
    (tmp_path / "runs/demo/align").mkdir(parents=True)
    (tmp_path / words[2]).symlink_to(checkpoint)
    command = [sys.executable, "-m", "deepseek_cli.main", *words[1:], "--port", "0"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = server.stdout.readline()
            port = int(re.search(r"http://127\.0\.0\.1:(\d+)/v1", said)[1])
            assert main(["serve", str(checkpoint), "--port", str(port)]) == 2
            assert "another program listens" in capsys.readouterr().err
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            body = {"model": words[2], "prompt": "PRIVATE", "max_tokens": 150, "temperature": 0, "stream": True}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            first = answer.readline()
            server.send_signal(signal.SIGTERM)
            rest = answer.read()
            assert first.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
            assert server.wait(60) == 143
            told = server.stdout.read() + server.stderr.read()
            assert "interrupted; 1 requests got their answer, 0 a refusal or no answer" in told
            assert "Traceback" not in told and "PRIVATE" not in told
        finally:
            server.kill()


WRONG = [
    (["--port", "70000"], "--port: got 70000"),
    (["--host", "0.0.0.0"], "--host: got 0.0.0.0, which other machines can reach"),
    (["--host", "no.such.host.invalid"], "--host: got"),
    (["--max-running", "0"], "--max-running: got 0"),
    (["--timeout", "nan"], "--timeout: got nan"),
]


def test_wrong_settings_end_in_one_line(checkpoint, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    key = tmp_path / "key.txt"
    key.write_text("short\n")
    for options, line in [*WRONG, (["--api-key-file", str(key)], "--api-key-file: got 5 characters")]:
        assert main(["serve", str(checkpoint), "--port", "0", *options]) == 2
        told = capsys.readouterr().err
        assert line in told and told.count("\n") == 1


def test_a_missing_extra_is_named(checkpoint, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("deepseek_serving.openai_endpoint", "uvicorn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(checkpoint)]) == 2
    assert "pip install 'deepseek-moe[serve]'" in capsys.readouterr().err
