"""The listening socket of a server, and whether other machines can reach an address."""

import errno
import ipaddress
import socket


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
