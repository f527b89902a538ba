"""The listening socket, and an end in order: what runs is finished within a grace time, the rest is refused."""

import asyncio
import errno
import ipaddress
import socket
from types import FrameType

import uvicorn

from deepseek_records.exit_codes import RunFailedError
from deepseek_serving.openai_endpoint.app import Service, build_app

_LOOK_S = 0.2


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that is bound, before the model is loaded.

    Args:
        host: An address or a name.
        port: 0 takes any that is free.

    Raises:
        ValueError: The port is taken or not allowed, or the host is not one of this machine's.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(256)  # now, so that a second server learns of it while this one still loads its model
    except socket.gaierror as error:
        raise ValueError(f"--host: got {host!r}, expected an address of this machine ({error.strerror})") from None
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"--port: got {port}, on which another program listens, expected a free one; 0 takes any"
            ) from None
        setting = "--port" if error.errno == errno.EACCES else "--host"
        raise ValueError(f"{setting}: {host} port {port} cannot be taken ({error.strerror})") from None
    return listener


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address.

    Args:
        host: An address or a name.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)}
    except socket.gaierror:
        return False
    return all(ipaddress.ip_address(str(address).partition("%")[0]).is_loopback for address in found)


class Server(uvicorn.Server):
    """uvicorn's server with our end.

    Args:
        service: The server's parts.
        api_key: What clients must send; None asks for nothing.
        grace_s: How long requests may go on after the first signal.
    """

    def __init__(self, service: Service, *, api_key: str | None = None, grace_s: float = 20.0) -> None:
        self.service = service
        self.grace_s = grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            uvicorn.Config(
                build_app(service, api_key),
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=int(grace_s) + 5,
            )
        )

    def run_on(self, listener: socket.socket) -> None:
        """Serve until a signal, which is raised again at the end.

        Args:
            listener: From `bind`.

        Raises:
            RunFailedError: The model's thread died.
        """
        self.run(sockets=[listener])
        failure = self.service.engine.failure
        if failure is not None:
            raise RunFailedError(f"the model stopped ({failure}); start the server again")

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve, and look after the model's thread."""
        self._loop = asyncio.get_running_loop()
        watch = asyncio.ensure_future(self._watch())
        try:
            await super().serve(sockets)
        finally:
            watch.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin the end: nothing new is taken on, and what runs has its grace time."""
        super().handle_exit(sig, frame)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.begin_end)

    def begin_end(self) -> None:
        """Refuse what comes, and end what is not done after the grace time; called in the event loop."""
        self.should_exit = True
        self.service.engine.drain()
        asyncio.get_running_loop().call_later(self.grace_s, self.service.engine.abort)

    async def _watch(self) -> None:
        while self.service.engine.failure is None:
            await asyncio.sleep(_LOOK_S)
        self.should_exit = True
