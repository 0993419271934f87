"""Where connections come in."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import ClassVar, Final

from daemon.core.errors import OperatorFault
from daemon.gateway.http import Page
from daemon.gateway.state import address_name, log

BACKLOG: Final = 4096  # connections that may wait in the kernel, in a storm or while the daemon restarts
ACCEPTS: Final = 64  # connections accepted in a row before anybody else has a turn
COURTESY: Final = 0.005  # seconds that a connection is left to another process which should have it
USER_TIMEOUT: Final = 60_000  # milliseconds without an acknowledgement; we cut sooner, and know why

# "localhost" has an IPv6 address on machines that have no IPv6.
_NOT_HERE: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class ListenFailed(OperatorFault):
    """Cannot listen on {address}: {reason}. Choose another with --listen, or ROWCAST_METRICS_LISTEN."""

    exit_code: ClassVar[int] = 69

    def __init__(self, address: str, reason: str) -> None:
        self.address = address
        self.reason = reason


class Acceptor:
    """Accepts what comes in at one socket, some at a time, and hands it over before anything is made of it.

    asyncio's own server would accept as many in a row as may wait in the kernel, and make a transport of each
    before it can be refused: a storm would starve the loop and take every descriptor.
    """

    def __init__(
        self,
        listening: socket.socket,
        admit: Callable[[socket.socket], None],
        should_accept: Callable[[], bool] = lambda: True,
    ) -> None:
        listening.setblocking(False)
        listening.listen(BACKLOG)
        # Accepted sockets inherit these; asyncio sets the first only where it has made the socket itself.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
        self._socket = listening
        self._admit = admit
        self._should_accept = should_accept
        self.resume()

    def resume(self) -> None:
        """Accept, or again after descriptors ran out; harmless if it does already."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._socket, self._arrived)

    def close(self) -> None:
        """Accept no more. Others who hold the same socket, such as systemd, still may."""
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _arrived(self) -> None:
        if self._should_accept():
            self._accept()
        else:  # whoever shares this socket with us hears of it too, and may be there before us
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._socket)
            loop.call_later(COURTESY, self._insist)

    def _insist(self) -> None:
        if self._socket.fileno() >= 0:
            self.resume()
            self._accept()

    def _accept(self) -> None:
        for _ in range(ACCEPTS):
            try:
                connection, _ = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # it has gone again
            except OSError as error:
                log.info("client_refused", status=None, reason=os.strerror(error.errno or 0))
                asyncio.get_running_loop().remove_reader(self._socket)
                return
            connection.setblocking(False)
            self._admit(connection)


def refuse(connection: socket.socket, page: Page) -> None:
    """Answer without waiting for the question, and close."""
    log.debug("client_refused", status=page.status, reason="full")
    with connection, suppress(OSError):
        connection.send(page.serialize())


async def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for every address of `host`, all with the same port. Raises ListenFailed."""
    bound: list[socket.socket] = []
    absent: OSError | None = None
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            chosen = bound[0].getsockname()[1] if bound else port
            try:
                bound.append(socket.create_server((address[0], chosen, *address[2:]), family=family))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                absent = error
        if absent is not None and not bound:
            raise absent
    except (OSError, UnicodeError) as error:
        for listening in bound:
            listening.close()
        raise ListenFailed(address_name(host, port), _reason(error)) from error
    return bound


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "this is no host name"
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno or 0)
