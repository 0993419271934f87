"""Listening sockets: bind them, accept connections in batches, refuse those beyond the limit."""

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from pathlib import Path
from typing import ClassVar, Final

from daemon import metrics
from daemon.core.errors import OperatorFault
from daemon.gateway.admission import ANONYMOUS
from daemon.gateway.http import Page
from daemon.gateway.state import address_name, log, refuse

BACKLOG: Final = 4096  # connections that wait in the kernel during a storm, or while the daemon restarts
ACCEPT_BATCH: Final = 16  # connections accepted in one iteration of the event loop
YIELD_DELAY: Final = 0.005  # seconds for which a connection is left to another process
# Bytes that wait in the kernel for a peer that does not take them; we keep the rest, or leave it in the log. The
# kernel's own bound is megabytes for each connection.
UNSENT: Final = 128 * 1024
# Milliseconds without an acknowledgement, or without room at the peer. Pings normally find a dead peer sooner. A peer
# that took a little and then nothing has twice the drain timeout, and must not be gone before it is told why.
USER_TIMEOUT: Final = 90_000

# "localhost" has an IPv6 address on machines that have no IPv6.
_UNAVAILABLE: Final = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class ListenFailed(OperatorFault):
    """Cannot listen on {address}: {reason}. Choose another with --listen, or ROWCAST_METRICS_LISTEN."""

    exit_code: ClassVar[int] = 69

    def __init__(self, address: str, reason: str) -> None:
        self.address = address
        self.reason = reason


class Acceptor:
    """Accepts connections from one listening socket, in batches, and passes each to `admit` with its peer's address.

    asyncio's own server accepts up to a whole backlog in one go, and builds a transport for each connection before
    it could be refused. A storm of connections would block the loop and use up every file descriptor.

    `should_accept` says whether this process should take the next connection. If not, it is left for a moment to
    the other processes that share the socket. `delay` says for how many seconds nobody can be let in.
    """

    def __init__(
        self,
        listening: socket.socket,
        admit: Callable[[socket.socket, str], None],
        should_accept: Callable[[], bool] = lambda: True,
        delay: Callable[[], float] = lambda: 0.0,
    ) -> None:
        listening.setblocking(False)
        listening.listen(BACKLOG)
        self._is_unix = listening.family == socket.AF_UNIX
        if not self._is_unix:
            # Accepted sockets inherit the options. asyncio sets the first only on sockets that it creates.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
            if hasattr(socket, "TCP_NOTSENT_LOWAT"):
                listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        self._socket = listening
        self._admit = admit
        self._should_accept = should_accept
        self._delay = delay
        self._paused: asyncio.Handle | None = None
        self._is_held_up = False  # paused because nobody can be let in
        self.resume()

    def resume(self) -> None:
        """Start accepting, or start again after descriptors ran out. Harmless if already accepting, or paused."""
        if self._socket.fileno() >= 0 and self._paused is None:
            asyncio.get_running_loop().add_reader(self._socket, self._on_readable)

    def accept_again(self) -> None:
        """Accept in the next iteration: there is room for somebody sooner than `delay` said."""
        if self._paused is not None and self._is_held_up:
            self._is_held_up = False
            self._paused.cancel()
            # What is logged then is not about the client who makes room.
            self._paused = asyncio.get_running_loop().call_soon(self._accept_anyway, context=Context())

    def close(self) -> None:
        """Stop accepting. Other processes with the same socket, such as systemd, are not affected."""
        if self._paused is not None:
            self._paused.cancel()
            self._paused = None
        if self._socket.fileno() >= 0:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()

    def _on_readable(self) -> None:
        if self._should_accept():
            self._accept()
        else:  # the processes that share this socket are notified too, and can accept first
            self._pause(YIELD_DELAY)

    def _pause(self, delay: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        self._paused = loop.call_later(delay, self._accept_anyway)

    def _accept_anyway(self) -> None:
        self._paused, self._is_held_up = None, False
        self.resume()
        self._accept()

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            if (delay := self._delay()) > 0:
                self._is_held_up = True
                self._pause(delay)
                return
            try:
                connection, address = self._socket.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # the client gave up before it was accepted
            except OSError as error:
                metrics.REFUSED.labels(reason="files").inc()
                log.info("client_refused", reason=os.strerror(error.errno or 0))
                asyncio.get_running_loop().remove_reader(self._socket)
                return
            connection.setblocking(False)
            self._admit(connection, ANONYMOUS if self._is_unix else address[0])


def turn_away(connection: socket.socket, page: Page, reason: str) -> None:
    """Send `page` without reading the request, and close."""
    refuse(reason, status=page.status)
    with connection, suppress(OSError):
        connection.send(page.serialize())


async def bind(host: str, port: int) -> list[socket.socket]:
    """Bind one socket for each address of `host`, all to the same port. Raises ListenFailed.

    A host "unix:/PATH" is a Unix socket.
    """
    bound: list[socket.socket] = []
    unavailable: OSError | None = None
    try:
        if host.startswith("unix:"):
            return [_bind_path(host.removeprefix("unix:"))]
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for family, address in dict.fromkeys((family, address) for family, *_, address in found):
            chosen = bound[0].getsockname()[1] if bound else port
            try:
                bound.append(socket.create_server((address[0], chosen, *address[2:]), family=family))
            except OSError as error:
                if error.errno not in _UNAVAILABLE:
                    raise
                unavailable = error
        if unavailable is not None and not bound:
            raise unavailable
    except (OSError, UnicodeError) as error:
        for listening in bound:
            listening.close()
        raise ListenFailed(address_name(host, port), _reason(error)) from error
    return bound


def _bind_path(path: str) -> socket.socket:
    """Bind a Unix socket that every user may connect to who can reach it, in place of one that nobody listens on."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket() and not _is_listening(path):
            Path(path).unlink()
        listening.bind(path)
        Path(path).chmod(0o666)  # like a port: tokens say who may do what
    except OSError:
        listening.close()
        raise
    return listening


def _is_listening(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return False
    return True


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "not a valid host name"
    if isinstance(error, socket.gaierror):
        return error.strerror or str(error)
    return os.strerror(error.errno or 0)
