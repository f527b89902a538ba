"""Serves the page that shows one server: one HTML file, its figures as JSON, and a webhook for Alertmanager."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any

from deepseek_serving.monitoring.watch import Watch

_MAX_BODY = 1_000_000


def make_server(watch: Watch, port: int, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Return a server of the page, bound and not yet running.

    Args:
        watch: What is shown.
        port: 0 takes any that is free.
        host: Only this machine by default.

    Raises:
        ValueError: The port is taken.
    """
    html = resources.files(__package__).joinpath("templates/page.html").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/":
                self._send(200, html, "text/html; charset=utf-8")
            elif self.path == "/state":
                self._send(200, json.dumps(watch.state()).encode(), "application/json")
            else:
                self._send(404, b"not here", "text/plain")

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if self.path != "/alerts" or not 0 < size <= _MAX_BODY:
                self._send(404, b"not here", "text/plain")
                return
            try:
                number = watch.alarms.receive(json.loads(self.rfile.read(size)))
            except (ValueError, KeyError, TypeError, AttributeError):
                self._send(400, b"body: expected Alertmanager's JSON", "text/plain")
                return
            self._send(200, f"{number} alarms noted".encode(), "text/plain")

        def _send(self, status: int, body: bytes, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise ValueError(f"--port: {host} port {port} cannot be taken ({error.strerror}); 0 takes any") from None


def serve_page(watch: Watch, server: ThreadingHTTPServer) -> None:
    """Look at the watched server and serve the page until interrupted.

    Args:
        watch: What is shown.
        server: From `make_server`.
    """
    stop = threading.Event()
    looking = threading.Thread(target=watch.run, args=(stop,), daemon=True)
    looking.start()
    try:
        server.serve_forever()
    finally:
        stop.set()
        server.server_close()
