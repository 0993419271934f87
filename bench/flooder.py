"""The flood client. It reads JSON from stdin (see `Given`), then commands: `go`; `mark`, which it answers.

Without a port it floods a server of its own, which takes everything in and does nothing with it: as many processes
are as busy with the same bytes then, but not the daemon.
"""

import asyncio
import json
import random
import resource
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Final, TypedDict

from bench.rig import raise_open_files
from daemon.core.wire import SUBPROTOCOL

LOCAL: Final = "127.0.0.1"
STAY: Final = 5.0  # seconds that a peer stays which wants a place and nothing else
TOGETHER: Final = 40  # pings in one write
AHEAD: Final = 64  # subscribes without an answer, on one connection
TEXT, PING = 0x81, 0x89

UPGRADE: Final = (
    "GET /v1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    f"Sec-WebSocket-Protocol: {SUBPROTOCOL}\r\n\r\n"
).encode()
REQUEST: Final = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
SWITCHING: Final = b"HTTP/1.1 101 Switching Protocols\r\n\r\n"
OK: Final = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nok\n"


Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Given(TypedDict):
    """What to do. `rate` is in units a second, 0 for as many as get through; `certificate` and `key` are files."""

    kind: str
    connections: int
    rate: float
    port: int
    token: str
    since: str
    topic: str
    certificate: str
    key: str


def frame(text: bytes, first: int = TEXT) -> bytes:
    """A frame of a client, masked with zeros."""
    size = len(text)
    length = bytes([128 | size]) if size < 126 else bytes([254]) + size.to_bytes(2)
    return bytes([first]) + length + bytes(4) + text


PINGS: Final = (frame(b'{"op":"ping"}') + frame(b"", PING)) * (TOGETHER // 2)
NESTED: Final = frame(b'{"op":"ping","more":[' + b",".join([b"[" * 50 + b"]" * 50] * 600) + b"]}")


class Flooder:
    """A flood of one kind, on so many connections; each is made again when it ends. `done` counts units."""

    def __init__(self, given: Given, port: int) -> None:
        self.done = 0
        self._given = given
        self._port = port
        self._due = 0.0
        self._peer = KINDS[given["kind"]]
        self._tls: ssl.SSLContext | None = None
        if given["certificate"]:
            self._tls = ssl.create_default_context()
            self._tls.check_hostname, self._tls.verify_mode = False, ssl.CERT_NONE

    async def run(self) -> None:
        """Flood until cancelled."""
        await asyncio.gather(*(self._again() for _ in range(self._given["connections"])))

    async def _again(self) -> None:
        while True:
            with suppress(OSError, EOFError, TimeoutError):
                await self._peer(self)
            await asyncio.sleep(0.001)

    async def _turn(self) -> None:
        """Wait until the next unit is due, and count it."""
        loop = asyncio.get_running_loop()
        if self._given["rate"]:
            self._due = max(self._due, loop.time() - 0.1) + 1 / self._given["rate"]
            await asyncio.sleep(max(0.0, self._due - loop.time()))
        self.done += 1

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[Streams]:
        reader, writer = await asyncio.open_connection(LOCAL, self._port, ssl=self._tls)
        writer.transport.set_write_buffer_limits(0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16 * 1024)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    @asynccontextmanager
    async def _websocket(self, *frames: dict[str, str]) -> AsyncIterator[Streams]:
        """A websocket that has sent these frames."""
        async with self._connected() as (reader, writer):
            writer.write(UPGRADE)
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"".join(frame(json.dumps(one).encode()) for one in frames))
            yield reader, writer

    def _hello(self) -> dict[str, str]:
        return {"op": "hello", "token": self._given["token"]}

    # The kinds.

    async def no_hello(self) -> None:
        """Unit: a websocket that says nothing."""
        await self._turn()
        async with self._websocket() as (reader, _), asyncio.timeout(STAY):
            await reader.read()

    async def request(self) -> None:
        """Unit: a request whose answer is read, on a connection that stays open."""
        await self._turn()
        async with self._connected() as (reader, writer), asyncio.timeout(STAY):
            writer.write(REQUEST)
            while await reader.read(1000):
                pass
            await asyncio.Event().wait()

    async def ping(self) -> None:
        """Unit: pings, every other one of them a frame of the protocol."""
        await self._send(PINGS)

    async def nested(self) -> None:
        """Unit: a frame of 60 KB with nested lists."""
        await self._send(NESTED)

    async def _send(self, unit: bytes) -> None:
        async with self._websocket(self._hello()) as (reader, writer), _reading(reader, writer):
            while True:
                await self._turn()
                writer.write(unit)
                await writer.drain()

    async def subscribe(self) -> None:
        """Unit: a subscribe to a topic that does not exist."""
        ahead = asyncio.Semaphore(AHEAD)

        def answered(data: bytes) -> None:
            for _ in range(data.count(b'"op":"error"')):
                ahead.release()

        async with self._websocket(self._hello()) as (reader, writer), _reading(reader, writer, answered):
            while not writer.is_closing():
                if not self._given["rate"]:  # a server of our own does not answer
                    async with asyncio.timeout(STAY):
                        await ahead.acquire()
                await self._turn()
                topic = "channel:0" + "".join(random.choices("0123456789ABCDEFGHJKMNPQRSTVWXYZ", k=25))
                writer.write(frame(json.dumps({"op": "subscribe", "topic": topic}).encode()))
                await writer.drain()

    async def replay(self) -> None:
        """Unit: a connection that asks for everything and reads nothing of it."""
        await self._turn()
        follow = {"op": "subscribe", "topic": self._given["topic"]}
        async with self._websocket(self._hello() | {"since": self._given["since"]}, follow) as (reader, _):
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(random.uniform(0.6, 1) * STAY)

    async def token(self) -> None:
        """Unit: a hello with a token whose signature is wrong, and another one each time."""
        await self._turn()
        unsigned, _, signature = self._given["token"].rpartition(".")
        forged = "".join(random.sample(signature, len(signature)))
        async with self._websocket({"op": "hello", "token": f"{unsigned}.{forged}"}) as (reader, _):
            async with asyncio.timeout(STAY):
                while b"\x88" not in await reader.read(1000):
                    pass

    async def handshake(self) -> None:
        """Unit: a TLS handshake."""
        await self._turn()
        async with self._connected():
            pass


KINDS: Final[dict[str, Callable[[Flooder], Awaitable[None]]]] = {
    "no_hello": Flooder.no_hello,
    "request": Flooder.request,
    "ping": Flooder.ping,
    "nested": Flooder.nested,
    "subscribe": Flooder.subscribe,
    "replay": Flooder.replay,
    "token": Flooder.token,
    "handshake": Flooder.handshake,
}


@asynccontextmanager
async def _reading(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, received: Callable[[bytes], object] = len
) -> AsyncIterator[None]:
    """Read what arrives meanwhile. At its end, writing fails."""

    async def read() -> None:
        with suppress(OSError):
            while data := await reader.read(100_000):
                received(data)
        writer.transport.abort()

    task = asyncio.create_task(read())
    try:
        yield
    finally:
        task.cancel()


async def sink(given: Given) -> asyncio.Server:
    """A server that takes everything in."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError):
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(SWITCHING if b"Upgrade" in head else OK)
            while await reader.read(64 * 1024):
                if given["kind"] == "token":
                    writer.write(b"\x88\x00")
        writer.transport.abort()

    tls = None
    if given["certificate"]:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(given["certificate"], given["key"])
    return await asyncio.start_server(serve, LOCAL, 0, ssl=tls, backlog=4096)


async def main() -> None:
    """Read what to do, and do it."""
    raise_open_files()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    given: Given = json.loads(await reader.readline())
    port = given["port"] or (await sink(given)).sockets[0].getsockname()[1]
    flooder, flooding = Flooder(given, port), None
    print(json.dumps({"ready": True}), flush=True)
    while command := (await reader.readline()).strip():
        if command == b"go":
            flooding = asyncio.create_task(flooder.run())
        used = resource.getrusage(resource.RUSAGE_SELF)
        failed = flooding is not None and flooding.done() and flooding.exception()
        if failed:
            raise failed
        print(json.dumps({"done": flooder.done, "cpu": used.ru_utime + used.ru_stime}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
