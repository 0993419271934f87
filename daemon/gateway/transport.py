"""One accepted socket: reads it, and writes what any number of others may be written too."""

import asyncio
import socket
from collections import deque
from contextlib import suppress
from itertools import islice
from typing import Final, Protocol

from daemon.gateway.state import log, peer_name

READ: Final = 64 * 1024  # bytes taken from the kernel at once
HIGH: Final = 64 * 1024  # bytes that wait when the peer counts as full
LOW: Final = 16 * 1024  # bytes that wait when it no longer does
MAX_FRAMES_PER_SEND: Final = 64  # frames handed to the kernel at once


class TransportProtocol(Protocol):
    """Who reads and writes through a `Transport`. Nothing here is called from inside `write`, but for `filled`."""

    def data_received(self, data: bytes) -> None:
        """Bytes came in."""

    def eof_received(self) -> None:
        """The peer will send nothing more. What waits is still written, then the connection is closed."""

    def pause_writing(self) -> None:
        """More than HIGH bytes wait for the peer."""

    def resume_writing(self) -> None:
        """Only LOW bytes or less wait, after more than HIGH did."""

    def connection_lost(self) -> None:
        """The connection has ended. Called exactly once, and last."""


class Transport:
    """A socket that does not block, and what waits to be written to it.

    asyncio's own would copy what waits for each peer, and takes three calls and a task more until it reads. `user`
    may be exchanged at any time. No method raises once the peer has gone.
    """

    __slots__ = (
        "_closing",
        "_eof",
        "_fd",
        "_full",
        "_loop",
        "_lost",
        "_reading",
        "_send",
        "_waiting",
        "connection",
        "protocol",
        "queued",
    )

    protocol: TransportProtocol

    def __init__(self, connection: socket.socket) -> None:
        """Set `user`, and call `resume_reading`, to begin."""
        self._loop = asyncio.get_running_loop()
        self.connection = connection
        self._fd = connection.fileno()
        self._send = connection.send
        self._waiting: deque[bytes | memoryview] | None = None
        self.queued = 0  # bytes that wait
        self._full = False
        self._reading = False
        self._eof = False  # nothing is written behind what waits
        self._closing = False  # nothing is read any more, and it ends behind what waits
        self._lost = False

    def write(self, data: bytes) -> int:
        """Hand bytes to the peer, or keep them until it takes them. Returns how many wait now."""
        if self.queued:
            self._wait(data)
        elif not self._lost:
            try:
                sent = self._send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.abort()
                return 0
            if sent != len(data):
                self._wait(memoryview(data)[sent:] if sent else data)
        return self.queued

    def write_eof(self) -> None:
        """Nothing more will be written."""
        self._eof = True
        if not self.queued:
            self._finish()

    def close(self) -> None:
        """Read no more; end once what waits has been written."""
        self._closing = True
        self.pause_reading()
        if not self.queued:
            self.abort()

    def abort(self) -> None:
        """End now, whatever waits. `lost` follows soon, and not from inside this call."""
        if not self._lost:
            self._closing = self._lost = True
            self.pause_reading()
            self._forget()
            self._loop.call_soon(self._end)

    def pause_reading(self) -> None:
        """Take nothing from the peer for now."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        """Take what comes."""
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        try:
            data = self.connection.recv(READ)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        try:
            if data:
                self.protocol.data_received(data)
            else:
                self.protocol.eof_received()
                self.close()
        except Exception:  # noqa: BLE001 - whatever it is, it stays with this peer
            log.exception("internal_error", peer=peer_name(self.connection))
            self.abort()

    def _wait(self, data: bytes | memoryview) -> None:
        if self._lost or not data:
            return
        if self._waiting is None:
            self._waiting = deque()
            self._loop.add_writer(self._fd, self._write_on)
        self._waiting.append(data)
        self.queued += len(data)
        if self.queued > HIGH and not self._full:
            self._full = True
            self.protocol.pause_writing()

    def _write_on(self) -> None:
        """The kernel has room."""
        assert self._waiting
        try:
            sent = self.connection.sendmsg(list(islice(self._waiting, MAX_FRAMES_PER_SEND)))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        self.queued -= sent
        while sent and sent >= len(self._waiting[0]):
            sent -= len(self._waiting.popleft())
        if sent:
            self._waiting[0] = memoryview(self._waiting[0])[sent:]
        if not self.queued:
            self._forget()
        if self._full and self.queued <= LOW:
            self._full = False
            self.protocol.resume_writing()
        if not self.queued:
            self._finish()

    def _forget(self) -> None:
        if self._waiting is not None:
            self._waiting = None
            self._loop.remove_writer(self._fd)
        self.queued = 0

    def _finish(self) -> None:
        """Everything has been written."""
        if self._closing:
            self.abort()
        elif self._eof:
            with suppress(OSError):  # the peer may have gone a moment ago
                self.connection.shutdown(socket.SHUT_WR)

    def _end(self) -> None:
        try:
            self.protocol.connection_lost()
        finally:
            del self.protocol  # or the two would wait for the garbage collector
            self.connection.close()
