"""A gateway under test with handlers that record, and peers that may misbehave."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import connect
from websockets.frames import Frame, Opcode
from websockets.typing import Subprotocol

from daemon.core.close_codes import Close
from daemon.core.ports import Socket
from daemon.gateway.door import Door
from daemon.gateway.http import Handler, Page, Site
from daemon.gateway.server import Gateway, Limits, encode
from daemon.gateway.tls import Tls

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
    """A clock that stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    """A handler that records its calls, and replies to messages with `answer`.

    Its peer is authenticated at once as `user`, unless that is empty.
    """

    def __init__(self, client: Socket, answer: Callable[["Recorder", bytes], None], user: str = "ada") -> None:
        self.socket = client
        if user:
            client.authenticated(user)
        self.answer = answer
        self.texts: list[bytes] = []
        self.ticks: list[float] = []
        self.losses = 0
        self.close: Close | None = None
        self.lost = asyncio.Event()

    def message_received(self, text: bytes) -> None:
        self.texts.append(text)
        self.answer(self, text)

    def tick(self, now: float) -> None:
        self.ticks.append(now)

    def connection_lost(self, close: Close | None) -> None:
        self.losses += 1
        self.close = close
        self.lost.set()


class Follower:
    """A follower that writes to its socket what reaches it, and counts that."""

    def __init__(self, recorder: Recorder) -> None:
        self.socket: Socket = recorder.socket
        self.outlet = self.socket.outlet
        self.calls = 0

    def deliver(self, frames: bytes) -> None:
        self.calls += 1
        self.socket.write(frames)


def echo(recorder: Recorder, text: bytes) -> None:
    recorder.socket.write(encode(text))


def silence(recorder: Recorder, text: bytes) -> None:
    """Do not reply."""


@dataclass
class Server:
    """A listening gateway, its handlers in the order they were opened, and its clock."""

    gateway: Gateway
    clock: Clock
    host: str
    port: int
    admin_port: int
    handlers: asyncio.Queue[Recorder]
    peers: list["RawPeer"] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"ws://{self.host}:{self.port}/v1"

    def connect(self, **options: Any) -> connect:
        """A well-behaved client."""
        settings: dict[str, Any] = {"subprotocols": [Subprotocol("rowcast.v1")], "ping_interval": None}
        return connect(self.url, **settings | options)

    async def raw(self, receive_buffer: int | None = None) -> "RawPeer":
        """A peer that has connected and sent nothing."""
        connection = socket.socket()
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.setblocking(False)
        self.peers.append(RawPeer(connection))
        await asyncio.get_running_loop().sock_connect(connection, (self.host, self.port))
        return self.peers[-1]

    async def open(self, receive_buffer: int | None = None) -> tuple["RawPeer", Recorder]:
        """A peer that has completed the handshake, and its handler."""
        peer = await self.raw(receive_buffer)
        await peer.send(request("GET /v1", UPGRADE))
        assert (await peer.read_head()).startswith(b"HTTP/1.1 101 ")
        return peer, await self.handlers.get()

    def pass_time(self, seconds: float) -> None:
        """Advance the clock second by second, with a tick each."""
        for _ in range(round(seconds)):
            self.clock.now += 1
            self.gateway.housekeep()


class RawPeer:
    """A TCP connection that a test controls byte by byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._loop = asyncio.get_running_loop()
        self.buffer = b""
        self.was_reset = False

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._socket, data)

    async def send_frame(self, opcode: Opcode, data: bytes = b"", *, fin: bool = True) -> None:
        await self.send(frame(opcode, data, fin=fin))

    async def read_some(self, limit: int = 65536) -> bytes:
        """The next bytes; empty at the end, even after a reset."""
        await asyncio.sleep(0)  # a socket that is always ready would never let the gateway run
        try:
            return await self._loop.sock_recv(self._socket, limit)
        except ConnectionError:
            self.was_reset = True
            return b""

    def read_at_once(self) -> None:
        """Read what both kernels hold, without a turn of the event loop."""
        with suppress(BlockingIOError):
            while data := self._socket.recv(2**20):
                self.buffer += data

    async def read_head(self) -> bytes:
        """An HTTP head, including its empty line."""
        while b"\r\n\r\n" not in self.buffer:
            data = await self.read_some()
            assert data, f"the connection ended after {self.buffer!r}"
            self.buffer += data
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        return head + b"\r\n\r\n"

    async def read_all(self) -> bytes:
        """Everything until the connection ends."""
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
        """Read up to the close frame. Returns its code."""
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
    """One masked frame, as clients send."""
    return Frame(opcode, data, fin).serialize(mask=True)


def request(start: str, headers: Mapping[str, str] | None = None, version: str = "HTTP/1.1") -> bytes:
    """The head of a request; `start` is its method and target. Host is localhost unless given."""
    given = {"Host": "localhost", **(headers or {})}
    lines = [f"{start} {version}", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def fill(recorder: Recorder) -> None:
    """Write until the peer's and both kernels' buffers are full, and some more."""
    for _ in range(250):
        recorder.socket.write(LARGE)
    assert recorder.socket.queued() > 2**20


async def until(condition: Callable[[], bool]) -> None:
    """Run the event loop until `condition` holds; only the suite's timeout limits the wait."""
    while not condition():
        await asyncio.sleep(0.001)


@asynccontextmanager
async def serving(
    pages: Mapping[str, Callable[[], Page]] | None = None,
    *,
    handle: Mapping[tuple[str, str], Handler] | None = None,
    answer: Callable[[Recorder, bytes], None] = echo,
    user: str = "ada",
    door: Door | None = None,
    tls: Tls | None = None,
    **limits: Any,
) -> AsyncIterator[Server]:
    """A gateway whose clock stands still, and which ticks only in `pass_time`.

    At the end it checks that no exception has reached the event loop's handler.
    """
    handlers: asyncio.Queue[Recorder] = asyncio.Queue()
    listening, admin = (socket.create_server(("127.0.0.1", 0)) for _ in range(2))
    uncaught: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: uncaught.append(context))

    def open_client(client: Socket) -> Recorder:
        recorder = Recorder(client, answer, user)
        handlers.put_nowait(recorder)
        return recorder

    clock = Clock()
    settings = Limits(**{"tick_every": 3600.0, "close_timeout": 0.2, "per_user": 10_000, **limits})
    async with Gateway(
        open_client, Site(pages or {}, handle), limits=settings, door=door, tls=tls, clock=clock
    ) as gateway:
        host, port = await gateway.start(sockets=[listening], admin=[admin])
        server = Server(gateway, clock, host, port, admin.getsockname()[1], handlers)
        try:
            yield server
        finally:
            for peer in server.peers:
                peer.close()
    assert uncaught == []
