"""Both sides of a gateway under test: an attendant that records, and peers that may misbehave."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import connect
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol

from daemon.core.close_codes import Close
from daemon.core.ports import Socket
from daemon.gateway.http import Page, Site
from daemon.gateway.server import Gateway, Limits, encode

SMALL = 4096  # bytes of a receive buffer
LARGE = encode(b"x" * 65000)
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
UPGRADE = {
    "Host": "localhost",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Protocol": "rowcast.v1",
}


class Clock:
    """Time passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    """An attendant that keeps what it is told, and answers with `answer`, by default the same text."""

    def __init__(self, client: Socket, answer: Callable[["Recorder", bytes], None]) -> None:
        self.socket = client
        self.answer = answer
        self.texts: list[bytes] = []
        self.ticks: list[float] = []
        self.losses = 0
        self.close: Close | None = None
        self.gone = asyncio.Event()

    def message_received(self, text: bytes) -> None:
        self.texts.append(text)
        self.answer(self, text)

    def tick(self, now: float) -> None:
        self.ticks.append(now)

    def connection_lost(self, close: Close | None) -> None:
        self.losses += 1
        self.close = close
        self.gone.set()


def echo(recorder: Recorder, text: bytes) -> None:
    recorder.socket.write(encode(text))


def silence(recorder: Recorder, text: bytes) -> None:
    """Answer nothing."""


@dataclass
class Served:
    """A gateway that listens, the attendants it has asked for in their order, and the time it believes in."""

    gateway: Gateway
    clock: Clock
    host: str
    port: int
    attendants: asyncio.Queue[Recorder]
    peers: list["RawPeer"] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"ws://{self.host}:{self.port}/v1"

    def connect(self, **options: Any) -> connect:
        """A well-behaved client."""
        settings: dict[str, Any] = {"subprotocols": [Subprotocol("rowcast.v1")], "ping_interval": None}
        return connect(self.url, **settings | options)

    async def raw(self, receive_buffer: int | None = None) -> "RawPeer":
        """A peer that has only connected."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.setblocking(False)
        self.peers.append(RawPeer(connection))
        await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
        return self.peers[-1]

    async def open(self, receive_buffer: int | None = None) -> tuple["RawPeer", Recorder]:
        """A peer that has shaken hands, and will read and write what the test says; and its attendant."""
        peer = await self.raw(receive_buffer)
        await peer.send(request("GET /v1", UPGRADE))
        assert (await peer.read_head()).startswith(b"HTTP/1.1 101 ")
        return peer, await self.attendants.get()

    def pass_time(self, seconds: float) -> None:
        """Let the clock go on by whole ticks of a second."""
        for _ in range(round(seconds)):
            self.clock.now += 1
            self.gateway.housekeep()


class RawPeer:
    """A TCP connection in the hands of a test."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self.buffer = b""
        self.was_reset = False

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def send_frame(self, opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> None:
        await self.send(frame(opcode, data, fin=fin))

    async def read_some(self, most: int = 65536) -> bytes:
        """What comes next; empty at the end, however the end came."""
        await asyncio.sleep(0)  # a socket that is always ready would never let the gateway have its turn
        try:
            return await self._loop.sock_recv(self._socket, most)
        except ConnectionError:
            self.was_reset = True
            return b""

    async def read_head(self) -> bytes:
        """An HTTP head, up to and with its empty line."""
        while b"\r\n\r\n" not in self.buffer:
            data = await self.read_some()
            assert data, f"the connection ended after {self.buffer!r}"
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    async def read_all(self) -> bytes:
        """Everything until the end."""
        while data := await self.read_some():
            self.buffer += data
        data, self.buffer = self.buffer, b""
        return data

    async def _exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            data = await self.read_some()
            if not data:
                raise EOFError
            self.buffer += data
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    async def read_frame(self) -> tuple[Opcode, bytes]:
        """The next frame of the server. Raises EOFError at the end."""
        first, second = await self._exactly(2)
        assert first & 0x80, "the server does not fragment"
        assert not second & 0x80, "the server does not mask"
        size = second & 0x7F
        if size >= 126:
            size = int.from_bytes(await self._exactly(2 if size == 126 else 8), "big")
        return Opcode(first & 0x0F), await self._exactly(size)

    async def read_close(self) -> int:
        """Read on to the close frame; its code."""
        while True:
            opcode, data = await self.read_frame()
            if opcode is Opcode.CLOSE:
                return int.from_bytes(data[:2], "big")

    def half_close(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End with an RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._socket.close()

    def close(self) -> None:
        self._socket.close()


def frame(opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> bytes:
    """One masked frame, as a client sends it."""
    return Frame(opcode, data, fin).serialize(mask=True)


def request(start: str, headers: Mapping[str, str] | None = None, version: str = "HTTP/1.1") -> bytes:
    """The head of a request; `start` is its method and target."""
    lines = [f"{start} {version}", *(f"{name}: {value}" for name, value in (headers or {}).items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def fill(recorder: Recorder) -> None:
    """Write until the peer's and both kernels' buffers are full, and some more."""
    for _ in range(250):
        recorder.socket.write(LARGE)
    assert recorder.socket.queued() > 2**20


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until it has come to pass; the suite's timeout is the only clock."""
    while not condition():
        await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(
    pages: Mapping[str, Callable[[], Page]] | None = None,
    *,
    answer: Callable[[Recorder, bytes], None] = echo,
    **limits: Any,
) -> AsyncIterator[Served]:
    """A gateway whose clock stands still, and which ticks only when it is told to.

    Whatever the test did to it, nothing may have reached the loop's exception handler.
    """
    attendants: asyncio.Queue[Recorder] = asyncio.Queue()
    uncaught: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: uncaught.append(context))

    def open_client(client: Socket) -> Recorder:
        recorder = Recorder(client, answer)
        attendants.put_nowait(recorder)
        return recorder

    clock = Clock()
    settings = Limits(**{"tick_every": 3600.0, "close_timeout": 0.2, **limits})
    async with Gateway(open_client, Site(pages or {}), limits=settings, clock=clock) as gateway:
        host, port = await gateway.start("127.0.0.1")
        served = Served(gateway, clock, host, port, attendants)
        try:
            yield served
        finally:
            for peer in served.peers:
                peer.close()
    assert uncaught == []
