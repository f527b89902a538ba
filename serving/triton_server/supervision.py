"""Keeps a Triton server's models answering: notices a dead or hung process, brings it back, counts it.

Triton goes on saying that it and the model are ready after a model's process was killed, and a `load` of a loaded
model does nothing. So the processes are looked at here, twice per second, and each model is asked something real from
time to time; what is dead is unloaded, which makes Triton's own answer true, and loaded again.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from deepseek_records.exit_codes import RunFailedError
from deepseek_serving.triton_server.process import TritonProcess, TritonRefusedError

_LOOK_S = 0.5
SERVER = "server"
# What a model says that lives but has no place for one more request.
_BUSY = ("Exceeds maximum queue size", "the queue is full", "shutting down")


class Supervisor:
    """Watches one server.

    Args:
        process: Started and ready.
        probe_every_s: How often each model is asked something.
        probe_timeout_s: A model that does not answer within this time counts as hung.
        load_timeout_s: How long a model may take to load.

    Attributes:
        restarts: Of each model, and of the server as a whole.
    """

    def __init__(
        self,
        process: TritonProcess,
        *,
        probe_every_s: float = 10.0,
        probe_timeout_s: float = 60.0,
        load_timeout_s: float = 300.0,
    ) -> None:
        self.process = process
        self.probe_every_s = probe_every_s
        self.probe_timeout_s = probe_timeout_s
        self.load_timeout_s = load_timeout_s
        self.restarts = dict.fromkeys((*process.models, SERVER), 0)
        self._stops = threading.Event()
        self._stubs: dict[str, int] = {}
        self._probed_at = time.monotonic()

    def begin(self) -> None:
        """Wait until every model answers, before anybody is told that the server listens.

        Raises:
            RunFailedError: It does not start, or a model does not answer.
        """
        self.process.wait_until_ready(self.load_timeout_s)
        for name in self.process.models:
            told = self.probe(name)
            if told is not None:
                raise RunFailedError(f"triton: {name} does not answer ({told})")
        self._stubs = self.process.stubs()

    def run(self) -> None:
        """Watch until `stop` is called.

        Raises:
            RunFailedError: Something could not be brought back.
        """
        while not self._stops.wait(_LOOK_S):
            self.look()

    def stop(self) -> None:
        """Let `run` return."""
        self._stops.set()

    def look(self) -> None:
        """Look once, and bring back what is dead."""
        if not self.process.is_alive:
            self._restart_server("it has ended")
            return
        alive = self.process.stubs()
        for name in self.process.models:
            if alive.get(name) is None or alive[name] != self._stubs.get(name):
                self._heal(name, "its process has died")
                return
        if time.monotonic() - self._probed_at > self.probe_every_s:
            self._probed_at = time.monotonic()
            for name in self.process.models:
                told = self.probe(name)
                if told is not None:
                    self._heal(name, told)
                    return

    def probe(self, name: str) -> str | None:
        """Ask a model for one real answer, ahead of its queue.

        Args:
            name: The model.

        Returns:
            What is wrong; None where it answers.
        """
        asked: dict[str, Any] = {"prompt": "a", "max_tokens": 1, "temperature": 0}
        path = f"/v2/models/{name}/generate"
        if name != "generate":
            path = f"/v2/models/{name}/infer"
            text = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a"]}
            asked = {"inputs": [text], "parameters": {"priority": 1}}
        try:
            self.process.ask("POST", path, asked, timeout_s=self.probe_timeout_s)
        except TritonRefusedError as error:
            return None if any(words in str(error) for words in _BUSY) else str(error)[:200]
        except OSError as error:
            return f"no answer: {error}"
        return None

    def _heal(self, name: str, why: str) -> None:
        """Unload and load one model."""
        self._count(name, why)
        if self.process.count_live(name):
            self._restart_server(f"requests that {name} had begun would wait for ever")
            return
        began = time.monotonic()
        stub = self.process.stubs().get(name)
        if stub is not None:
            self.process.end_stub(stub)  # an unload would wait for what a hung one still has
        self._control(name, "unload")
        ends = began + self.load_timeout_s
        while name in self.process.stubs() or self._is_ready(name):
            if time.monotonic() > ends:
                raise RunFailedError(f"triton: {name} could not be unloaded; the log is {self.process.log}")
            time.sleep(0.1)
        self._control(name, "load")
        told = self.probe(name)
        if told is not None:
            raise RunFailedError(f"triton: {name} was loaded again and does not answer ({told})")
        self._stubs = self.process.stubs()
        self.process.sweep()
        print(f"triton: {name} is back after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)

    def _restart_server(self, why: str) -> None:
        """Start everything again; open connections break, which is the only answer that their clients can get."""
        self._count(SERVER, why)
        self.process.kill_group()
        self.process.start()
        self.begin()
        print("triton: the server is back", file=sys.stderr, flush=True)

    def _control(self, name: str, action: str) -> None:
        try:
            self.process.ask(
                "POST", f"/v2/repository/models/{name}/{action}", {}, is_admin=True, timeout_s=self.load_timeout_s
            )
        except (TritonRefusedError, OSError) as error:
            if self.process.is_alive:
                raise RunFailedError(f"triton: {name} could not be {action}ed ({str(error)[:200]})") from None

    def _is_ready(self, name: str) -> bool:
        try:
            self.process.ask("GET", f"/v2/models/{name}/ready", timeout_s=5)
        except (TritonRefusedError, OSError):
            return False
        return True

    def _count(self, name: str, why: str) -> None:
        """Count and tell; the models show the counts in Triton's metrics when they load."""
        self.restarts[name] += 1
        counts = Path(self.process.run_folder, "restarts.json")
        counts.write_text(json.dumps(self.restarts), encoding="utf-8")
        print(f"triton: {name}: {why}; bringing it back", file=sys.stderr, flush=True)
