"""A transport for one accepted socket, whose write queue shares its buffers with other transports."""

import asyncio
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from itertools import islice
from typing import Final, Protocol

from daemon.gateway.state import log, peer_name

READ_SIZE: Final = 64 * 1024  # bytes read from the kernel at once
HIGH_WATER: Final = 64 * 1024  # queued bytes above which writing is paused
LOW_WATER: Final = 16 * 1024  # queued bytes at which writing is resumed
MAX_SEND_BUFFERS: Final = 64  # buffers passed to one sendmsg
# What reading logs has no correlation id but its own, and keeps no copy of what is set where a reader is added.
_NO_CONTEXT: Final = Context()
_RESET: Final = struct.pack("ii", 1, 0)  # closing sends a reset at once


class TransportProtocol(Protocol):
    """Callbacks of a `Transport`, named as in asyncio. Inside `write`, only `pause_writing` is ever called."""

    def data_received(self, data: bytes) -> None:
        """Bytes were received."""

    def eof_received(self) -> None:
        """The peer will send nothing more. Queued data is still written, then the connection is closed."""

    def pause_writing(self) -> None:
        """More than HIGH_WATER bytes are queued."""

    def resume_writing(self) -> None:
        """The queue has shrunk to LOW_WATER bytes or less after `pause_writing`."""

    def connection_lost(self) -> None:
        """The connection has ended. Called exactly once, as the last callback."""


class Transport:
    """A non-blocking socket and its write queue.

    asyncio's own transport copies queued data for each peer, and needs a task and several iterations of the loop
    before it reads. `protocol` may be replaced at any time. No method raises after the peer has disconnected.

    It is the Outlet of its connection from `allow_direct` until `forbid_direct`, `close`, `abort` or `write_eof`.
    """

    __slots__ = (
        "_charge",
        "_closing",
        "_direct",
        "_eof",
        "_fd",
        "_loop",
        "_lost",
        "_paused",
        "_queue",
        "_reading",
        "_spent",
        "client",
        "connection",
        "direct",
        "protocol",
        "queued",
        "written",
    )

    protocol: TransportProtocol

    def __init__(self, connection: socket.socket) -> None:
        """To start, set `protocol` and call `resume_reading`."""
        self._loop = asyncio.get_running_loop()
        self.connection = connection
        self.client = ""  # the address of the client, if the peer is a trusted proxy
        self._fd = connection.fileno()
        self._queue: deque[bytes | memoryview] | None = None
        self.queued = 0  # bytes
        self.written = 0  # bytes, with those that are queued
        self.direct = self._direct = -1  # see Outlet; the other is what it is while nothing is queued
        self._paused = False
        self._reading = False
        self._eof = False  # no writes follow the queued data
        self._closing = False  # reading has stopped; the connection ends after the queued data
        self._lost = False
        self._charge: Callable[[float], None] | None = None  # counts what reading takes, while nobody vouches for it
        self._spent = 0.0  # what has been counted

    def peer_name(self) -> str:
        """The peer, for the log; the client first if the peer is a trusted proxy."""
        name = peer_name(self.connection)
        return f"{self.client} via {name}" if self.client else name

    def write(self, data: bytes) -> int:
        """Send bytes, or queue what the kernel does not take. Returns how many bytes are queued."""
        self.written += len(data)
        if self.queued:
            self.enqueue(data)
        elif not self._lost:
            try:
                sent = self.connection.send(data)
            except (BlockingIOError, InterruptedError):
                sent = 0
            except OSError:
                self.abort()
                return 0
            if sent != len(data):
                self.enqueue(memoryview(data)[sent:] if sent else data)
        return self.queued

    def allow_direct(self) -> None:
        """Let others write whole messages to `direct` from now on, if what is written is what the peer gets."""
        if type(self.connection) is socket.socket and not self._closing and not self._eof:  # not one with TLS
            self._direct = self._fd
            self.direct = -1 if self.queued else self._fd

    def forbid_direct(self) -> None:
        """Let nothing bypass `write` any more."""
        self.direct = self._direct = -1

    def write_eof(self) -> None:
        """Shut down the sending side once the queue is empty. Nothing may be written afterwards."""
        self._eof = True
        self.forbid_direct()
        if not self.queued:
            self._queue_written()

    def close(self) -> None:
        """Stop reading, and end the connection once the queue is empty."""
        self._closing = True
        self.forbid_direct()
        self.pause_reading()
        if not self.queued:
            self.abort()

    def abort(self, *, reset: bool = False) -> None:
        """End the connection now and drop the queue. `connection_lost` follows from the event loop, not this call.

        With `reset`, the kernel too drops what the peer has not taken; it would keep that for minutes.
        """
        if not self._lost:
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._closing = self._lost = True
            self.forbid_direct()
            self.pause_reading()
            self._clear_queue()
            self._loop.call_soon(self._finish)

    def pause_reading(self) -> None:
        """Stop reading until `resume_reading`."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        """Read what the peer sends. Does nothing after `close` or `abort`."""
        if not self._reading and not self._closing:
            self._reading = True
            _NO_CONTEXT.run(self._loop.add_reader, self._fd, self._read)

    def end_if_failed(self) -> bool:
        """End the connection if it has failed: a peer that resets it goes unnoticed while nothing is read or written.

        Returns whether it has ended, now or before.
        """
        if not self._lost and self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.abort()
        return self._lost

    def spend(self, charge: Callable[[float], None], seconds: float) -> None:
        """Have this much CPU counted, and what reading takes, until `settle`."""
        self._charge = charge
        self.charge(seconds)

    def settle(self, *, refund: bool) -> float:
        """Count nothing more, and have what was counted given back, or not. Returns how much that was."""
        spent = self._spent
        if refund:
            self.charge(-spent)
        self._charge, self._spent = None, 0.0
        return spent

    def charge(self, seconds: float) -> None:
        """Have this much more CPU counted, unless nothing is."""
        if self._charge is not None:
            self._spent += seconds
            self._charge(seconds)

    def _read(self) -> None:
        if self._charge is None:
            self._receive()
        else:
            began = time.thread_time()
            self._receive()
            self.charge(time.thread_time() - began)

    def _receive(self) -> None:
        try:
            data = self.connection.recv(READ_SIZE)
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
        except Exception:  # noqa: BLE001 - a bug costs this peer only
            log.exception("internal_error", peer=self.peer_name())
            self.abort()

    def enqueue(self, data: bytes | memoryview) -> None:
        """Send this once the kernel takes it."""
        if self._lost or not data:
            return
        if self._queue is None:
            self._queue = deque()
            self.direct = -1
            self._loop.add_writer(self._fd, self._flush)
        self._queue.append(data)
        self.queued += len(data)
        if self.queued > HIGH_WATER and not self._paused:
            self._paused = True
            self.protocol.pause_writing()

    def _flush(self) -> None:
        """Send queued data; called when the kernel accepts more."""
        assert self._queue
        try:
            sent = self.connection.sendmsg(list(islice(self._queue, MAX_SEND_BUFFERS)))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.abort()
            return
        self.queued -= sent
        while sent and sent >= len(self._queue[0]):
            sent -= len(self._queue.popleft())
        if sent:
            self._queue[0] = memoryview(self._queue[0])[sent:]
        if not self.queued:
            self._clear_queue()
        if self._paused and self.queued <= LOW_WATER:
            self._paused = False
            self.protocol.resume_writing()
        if not self.queued:
            self._queue_written()

    def _clear_queue(self) -> None:
        if self._queue is not None:
            self._queue = None
            self._loop.remove_writer(self._fd)
        self.queued = 0
        self.direct = self._direct

    def _queue_written(self) -> None:
        """Do what had to wait for an empty queue."""
        if self._closing:
            self.abort()
        elif self._eof:
            with suppress(OSError):  # the peer may have disconnected just now
                self.connection.shutdown(socket.SHUT_WR)

    def _finish(self) -> None:
        try:
            self.protocol.connection_lost()
        finally:
            del self.protocol  # breaks the reference cycle, so neither waits for the garbage collector
            self.connection.close()
