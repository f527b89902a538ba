"""What every request passes before the endpoints: key, size, time to arrive. What comes out is counted."""

import asyncio
import hmac
import ipaddress
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from deepseek_serving.openai_endpoint.metrics import Metrics
from deepseek_serving.openai_endpoint.refusals import RequestRefusedError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

PATHS = ("/v1/models", "/v1/completions", "/v1/chat/completions", "/health", "/metrics")
# A client that sends its request drop by drop holds a connection only this long.
_ARRIVAL_S = 30.0


class Gate:
    """ASGI middleware around the application.

    Args:
        app: The application.
        metrics: Where to count.
        api_key: What `Authorization: Bearer` must hold, except for /health; None asks for none.
        max_body_bytes: Of a request.
    """

    def __init__(self, app: App, *, metrics: Metrics, api_key: str | None, max_body_bytes: int) -> None:
        self.app = app
        self.metrics = metrics
        self.api_key = api_key
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one connection's request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), "none"

        async def count_and_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        path = scope["path"] if scope["path"] in PATHS else "other"
        try:
            self._check_key(scope)
            self._check_host(scope)
            body = await asyncio.wait_for(self._read(receive), _ARRIVAL_S)
            await self.app(scope, _replay(body, receive), count_and_send)
        except RequestRefusedError as error:
            self.metrics.refused.labels(error.code).inc()
            await _answer(error, count_and_send)
        except TimeoutError:
            late = RequestRefusedError(408, f"the body did not arrive within {_ARRIVAL_S:g} s", code="late_body")
            self.metrics.refused.labels(late.code).inc()
            await _answer(late, count_and_send)
        finally:
            self.metrics.requests.labels(path, status).inc()
            self.metrics.http_duration.labels(path).observe(time.perf_counter() - started)

    def _check_key(self, scope: Message) -> None:
        if self.api_key is None or scope["path"] == "/health":
            return
        sent = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not hmac.compare_digest(sent, f"Bearer {self.api_key}".encode()):
            raise RequestRefusedError(401, "no valid API key in the header Authorization: Bearer KEY", code="no_key")

    def _check_host(self, scope: Message) -> None:
        """Refuse a web page that a browser on this machine was led to believe lives here, by a name of its own."""
        if self.api_key is not None or not _is_loopback(scope["server"][0]):
            return
        host = next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
        if not _is_loopback(host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host):
            raise RequestRefusedError(
                403, "without an API key this server answers to localhost and 127.0.0.1 only", code="foreign_host"
            )

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b""
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.max_body_bytes:
                raise RequestRefusedError(
                    413, f"body: got more than {self.max_body_bytes} bytes, expected at most that", code="large_body"
                )
            if not message.get("more_body", False):
                return b"".join(parts)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _replay(body: bytes, receive: Receive) -> Receive:
    is_first = True

    async def replay() -> Message:
        nonlocal is_first
        if is_first:
            is_first = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _answer(error: RequestRefusedError, send: Send) -> None:
    headers = [(b"content-type", b"application/json")]
    # What is left of a refused body is not read: the connection ends with the answer.
    headers += [(b"connection", b"close")] if error.status in (408, 413) else []
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})
