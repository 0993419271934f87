"""A TCP proxy that a test can make slow, deaf or rude, for what stands between a daemon and its peers."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

CHUNK = 64 * 1024
SEGMENT = 536  # bytes: a kernel holds megabytes for a connection that promises large ones
STEPS = 20  # slices a second in which a throttled way gives out its bytes

Target = Path | tuple[str, int]
"""A Unix socket, or host and port."""


@dataclass(eq=False)
class Way:
    """One direction. `delay` is in seconds for each piece, `rate` in bytes a second; nothing passes unless `open`.

    `holds` is set once something has come that may not pass.
    """

    delay: float = 0.0
    rate: float | None = None
    open: asyncio.Event = field(default_factory=asyncio.Event)
    holds: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.open.set()


@dataclass(eq=False)
class Link:
    """One connection through the proxy: the peer's side and the target's."""

    near: asyncio.StreamWriter
    far: asyncio.StreamWriter
    forgotten: bool = False

    def reset(self) -> None:
        """End both sides with RST."""
        for writer in (self.near, self.far):
            peer = writer.get_extra_info("socket")
            if peer is not None and peer.family != socket.AF_UNIX:
                with suppress(OSError):
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()


class Proxy:
    """Listens on 127.0.0.1. `up` leads to the target, `down` back from it; both may be changed at any time.

    A held way loses nothing: as after lost packets that are sent again, everything arrives once it opens. What is
    `forgotten` never arrives, and no end is told: a middle box that has lost its state.
    """

    def __init__(self, target: Target, *, buffer: int | None = None) -> None:
        """With `buffer`, no more than some times so many bytes from the target, a host and port, wait here."""
        self.target = target
        self.buffer = buffer
        self.up = Way()
        self.down = Way()
        self.port = 0
        self.accepted = 0
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def hold(self) -> None:
        """Let nothing through, either way. New connections are accepted and hear nothing."""
        for way in (self.up, self.down):
            way.open.clear()
            way.holds.clear()

    def heal(self) -> None:
        """Let everything through again, at once."""
        for way in (self.up, self.down):
            way.delay, way.rate = 0.0, None
            way.open.set()

    def forget(self) -> None:
        """Whoever is connected now hears nothing more, not even an end; new connections pass."""
        for link in self._links:
            link.forgotten = True

    def reset(self) -> int:
        """Cut every connection with RST; how many."""
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        """Stand there for as long as the block lasts."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            self.reset()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await server.wait_closed()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: writer.transport.abort())  # it may be cancelled before it has begun

    async def _serve(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        try:
            if isinstance(self.target, Path):
                far_reader, far = await asyncio.open_unix_connection(self.target)
            elif self.buffer is None:
                far_reader, far = await asyncio.open_connection(*self.target)
            else:
                far_reader, far = await self._narrow(self.target, self.buffer)
        except OSError:
            return
        link = Link(near, far)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._flow(link, near_reader, far, self.up))
                group.create_task(self._flow(link, far_reader, near, self.down))
        except* OSError:
            pass
        finally:
            self._links.discard(link)
            link.reset()

    async def _narrow(
        self, target: tuple[str, int], buffer: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        far = socket.socket()
        far.setblocking(False)
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
        try:
            await asyncio.get_running_loop().sock_connect(far, target)
        except OSError:
            far.close()
            raise
        return await asyncio.open_connection(sock=far, limit=buffer)

    async def _flow(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way) -> None:
        while data := await reader.read(CHUNK):
            if way.delay:
                await asyncio.sleep(way.delay)
            while data:
                if not way.open.is_set():
                    way.holds.set()
                await way.open.wait()
                if link.forgotten:
                    await asyncio.Event().wait()
                part = data if way.rate is None else data[: max(1, int(way.rate / STEPS))]
                if way.rate is not None:
                    await asyncio.sleep(len(part) / way.rate)
                data = data[len(part) :]
                writer.write(part)
                await writer.drain()
        if link.forgotten:
            await asyncio.Event().wait()
        raise ConnectionResetError
