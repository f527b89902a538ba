"""One Triton server as a child process: its command line, its log, questions to it, and an end that leaves nothing.

`supervision.py` watches it. All of its processes are in a process group of its own; its shared memory has a prefix of
its own, so that what a killed process leaves there is found and removed.
"""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from deepseek_records.exit_codes import RunFailedError
from deepseek_serving.triton_server.installation import Installation
from deepseek_serving.triton_server.ports import Listening, check_free

RUN_VARIABLE = "DEEPSEEK_MOE_TRITON_RUN"
_ADMIN_HEADER = "deepseek-moe-supervisor"
# What clients may not do. Their own header for the rest is `API_KEY_HEADER`.
_ADMIN_APIS = ("model-repository", "model-config", "shared-memory", "trace", "logging")
_CLIENT_APIS = ("metadata", "inference", "statistics")
API_KEY_HEADER = "api-key"
_SHARED_MEMORY = Path("/dev/shm")


class TritonRefusedError(Exception):
    """The server answered with an error.

    Args:
        status: HTTP status.
        message: Its words.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class TritonProcess:
    """Starts the server and talks to it.

    Args:
        installation: Where its program is.
        repository: From `write_repository`.
        listening: Its ports.
        grace_s: How long what runs may go on after `stop`.
    """

    def __init__(
        self, installation: Installation, repository: Path, listening: Listening, *, grace_s: float = 20.0
    ) -> None:
        self.installation = installation
        self.repository = repository
        self.listening = listening
        self.grace_s = grace_s
        self.models = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
        # Made by `start`: one that is never started leaves nothing behind.
        self.run_folder = Path(tempfile.gettempdir(), f"deepseek-moe-triton-{secrets.token_hex(8)}")
        self.log = self.run_folder / "server.log"
        self._admin_key = secrets.token_hex(16)
        self._prefix = f"deepseek_moe_{os.getpid()}_{secrets.token_hex(4)}_"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; `wait_until_live` follows.

        Raises:
            ValueError: A port is taken.
        """
        for port in (self.listening.http_port, self.listening.grpc_port, self.listening.metrics_port):
            check_free(port)
        self.run_folder.mkdir(mode=0o700, exist_ok=True)
        environment = os.environ | {
            "PATH": f"{self.installation.python / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
            "LD_LIBRARY_PATH": _join(sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")),
            RUN_VARIABLE: str(self.run_folder),
        }
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @property
    def pid(self) -> int:
        """Of the server."""
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        """Whether the server's own process runs."""
        return self._process is not None and self._process.poll() is None

    def stubs(self) -> dict[str, int]:
        """Return the process of each model."""
        found = {}
        for pid in self._group():
            words = _read(f"/proc/{pid}/cmdline").rstrip("\0").split("\0")
            if words[0].endswith(self.installation.stub.name):
                name = next((model for model in self.models if f"/{model}/" in words[1]), None)
                if name is not None:
                    found[name] = pid
        return found

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every model answers.

        Args:
            timeout_s: At most this long.

        Raises:
            RunFailedError: It ended, or is not ready in time.
        """
        ends = time.monotonic() + timeout_s
        while not self._is_ready():
            if not self.is_alive:
                raise RunFailedError(f"triton: the server did not start ({self.reason()})")
            if time.monotonic() > ends:
                raise RunFailedError(f"triton: not ready within {timeout_s:g} s; its log is {self.log}")
            time.sleep(0.2)

    def ask(
        self, method: str, path: str, body: Any = None, *, is_admin: bool = False, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """Return the answer to a request over HTTP.

        Args:
            method: GET or POST.
            path: Below the root.
            body: For JSON.
            is_admin: Send the supervisor's key.
            timeout_s: At most this long.

        Raises:
            TritonRefusedError: The status is not 200.
            OSError: The server is not there, or does not answer in time.
        """
        headers = {API_KEY_HEADER: self.listening.api_key} if self.listening.api_key else {}
        headers |= {_ADMIN_HEADER: self._admin_key} if is_admin else {}
        connection = http.client.HTTPConnection("127.0.0.1", self.listening.http_port, timeout=timeout_s)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read().decode("utf-8", "replace")
        except http.client.HTTPException as error:
            raise ConnectionError(str(error)) from None
        finally:
            connection.close()
        try:
            told = json.loads(text) if text else {}
        except ValueError:
            told = {"error": text}
        if answer.status != 200:
            raise TritonRefusedError(answer.status, str(told.get("error", text)))
        return told

    def stop(self) -> None:
        """End it: what runs has its grace time, and nothing of it is left."""
        if self._process is None:
            return
        if self.is_alive:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(self.grace_s + 10)
        self.kill()

    def kill(self) -> None:
        """End all of its processes now and remove their shared memory and folder."""
        self.kill_group()
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def kill_group(self) -> None:
        """End all of its processes now and remove their shared memory."""
        assert self._process is not None
        for pid in self._group():
            _send(pid, signal.SIGKILL)
        self._process.wait()
        ends = time.monotonic() + 5
        while self._group() and time.monotonic() < ends:
            time.sleep(0.05)
        self.sweep()

    def count_live(self, name: str) -> int:
        """Return how many requests a decoupled model had not answered when it was last heard of.

        Args:
            name: The model.
        """
        return int(_read(f"{self.run_folder}/{name}.live") or 0)

    def end_stub(self, pid: int) -> None:
        """Kill one model's process.

        Args:
            pid: From `stubs`.
        """
        _send(pid, signal.SIGKILL)

    def sweep(self) -> list[str]:
        """Remove what killed processes left in shared memory and no model's process uses. Returns the names.

        The server itself goes on holding the region of a model that hung, until it ends.
        """
        used = "".join(_read(f"/proc/{pid}/maps") for pid in self.stubs().values())
        left = [path for path in _SHARED_MEMORY.glob("*") if self._prefix in path.name and path.name not in used]
        for path in left:
            path.unlink(missing_ok=True)
        return [path.name for path in left]

    def reason(self) -> str:
        """Return the last error of the log in one line."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        errors = [line for line in lines if "error:" in line.lower() or "rror:" in line or line.startswith("E")]
        return " ".join((errors or lines or ["no log"])[-1].split())[:300]

    def _is_ready(self) -> bool:
        try:
            self.ask("GET", "/v2/health/ready", timeout_s=5)
        except (OSError, TritonRefusedError):
            return False
        return True

    def _group(self) -> list[int]:
        """Processes of the server's session."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                fields = _read(f"{entry}/stat").rpartition(")")[2].split()
                if fields and int(fields[3]) == self.pid and fields[0] not in "ZX":  # session and state
                    found.append(int(entry.name))
        return found

    def _command(self) -> list[str]:
        where, names = self.listening, self.models
        words = {
            "model-repository": self.repository.resolve(),
            "backend-directory": self.installation.backends,
            "model-control-mode": "explicit",
            "http-address": "127.0.0.1",
            "http-port": where.http_port,
            "grpc-address": where.grpc_host,
            "grpc-port": where.grpc_port,
            "metrics-address": "127.0.0.1",
            "metrics-port": where.metrics_port,
            "metrics-config": "summary_latencies=true",
            "exit-timeout-secs": max(1, round(self.grace_s)),
            "log-info": "false",
            "backend-config": f"python,shm-region-prefix-name={self._prefix}",
            "http-restricted-api": f"{','.join(_ADMIN_APIS)}:{_ADMIN_HEADER}={self._admin_key}",
            "grpc-restricted-protocol": f"{','.join(_ADMIN_APIS)}:{_ADMIN_HEADER}={self._admin_key}",
        }
        command = [str(self.installation.server), *(f"--{name}={value}" for name, value in words.items())]
        command += [f"--load-model={name}" for name in names]
        if where.api_key is not None:
            rule = f"{','.join(_CLIENT_APIS)}:{API_KEY_HEADER}={where.api_key}"
            command += [f"--http-restricted-api={rule}", f"--grpc-restricted-protocol={rule}"]
        if where.tls is not None:
            command += [
                "--grpc-use-ssl=true",
                f"--grpc-server-cert={where.tls[0]}",
                f"--grpc-server-key={where.tls[1]}",
            ]
        return command


def _read(path: str) -> str:
    """A file of /proc; empty where its process has gone."""
    try:
        return Path(path).read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _send(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _join(*places: str | None) -> str:
    return os.pathsep.join(place for place in places if place)
