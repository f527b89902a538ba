"""The server's run and its end in order: what runs is finished within a grace time, the rest is refused."""

import asyncio
import socket
from types import FrameType

import uvicorn

from deepseek_records.exit_codes import RunFailedError
from deepseek_serving.openai_endpoint.app import Service, build_app

_LOOK_S = 0.2


class Server(uvicorn.Server):
    """uvicorn's server with our end.

    Args:
        service: The server's parts.
        api_key: What clients must send; None asks for nothing.
        grace_s: How long requests may go on after the first signal.
        tls: Files of a certificate and its key; None speaks plain HTTP.
    """

    def __init__(
        self,
        service: Service,
        *,
        api_key: str | None = None,
        grace_s: float = 20.0,
        tls: tuple[str, str] | None = None,
    ) -> None:
        self.service = service
        self.grace_s = grace_s
        self._loop: asyncio.AbstractEventLoop | None = None
        super().__init__(
            uvicorn.Config(
                build_app(service, api_key),
                log_config=None,  # its own closes every log handler of the process
                log_level="error",
                access_log=False,
                server_header=False,
                lifespan="off",
                timeout_graceful_shutdown=int(grace_s) + 5,
                ssl_certfile=None if tls is None else tls[0],
                ssl_keyfile=None if tls is None else tls[1],
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
