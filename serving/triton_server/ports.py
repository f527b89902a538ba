"""Where a Triton server listens, and ports that are free."""

import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Listening:
    """Where the server listens and who may ask.

    Attributes:
        http_port: Always on 127.0.0.1.
        grpc_host: Where gRPC listens.
        grpc_port: Its port.
        metrics_port: Always on 127.0.0.1.
        api_key: What clients must send; None asks for nothing.
        tls: Files of certificate and key for gRPC; None leaves it plain.
    """

    http_port: int
    grpc_port: int
    metrics_port: int
    grpc_host: str = "127.0.0.1"
    api_key: str | None = None
    tls: tuple[Path, Path] | None = None


def find_free_ports(number: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody has now.

    Args:
        number: How many.
    """
    sockets = [socket.socket() for _ in range(number)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def check_free(port: int) -> None:
    """Refuse a port that somebody has.

    Args:
        port: Of 127.0.0.1.

    Raises:
        ValueError: It cannot be taken.
    """
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"--port: got {port}, which cannot be taken ({error.strerror}), expected a free one; 0 takes any"
            ) from None
