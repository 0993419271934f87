"""A TCP proxy that can delay, throttle, hold back, drop or reset the traffic between a daemon and its peers."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.listening import stop_accepting

CHUNK = 64 * 1024
SEGMENT = 536  # bytes: with large segments, kernels buffer megabytes for a connection
STEPS = 20  # slices a second in which a throttled direction passes its bytes on

Target = Path | tuple[str, int]
"""A Unix socket, or host and port."""


@dataclass(eq=False)
class Direction:
    """One direction. `delay` is in seconds for each piece, `rate` in bytes a second; nothing passes unless `open`.

    It closes after `allowed` more pieces. `holds` is set once data has arrived that may not pass.
    """

    delay: float = 0.0
    rate: float | None = None
    allowed: int | None = None
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
    """Listens on 127.0.0.1. `up` leads to the target, `down` back from it; both can be changed at any time.

    A direction that is held loses nothing: everything arrives once it opens, as after retransmissions. What a
    `forgotten` connection sends never arrives, nor does its end: a middlebox that has lost its state.
    """

    def __init__(self, target: Target, *, buffer: int | None = None) -> None:
        """`buffer` limits the bytes from the target, a host and port, that wait here to a few times that number."""
        self.target = target
        self.buffer = buffer
        self.up = Direction()
        self.down = Direction()
        self.port = 0
        self.accepted = 0
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def hold(self) -> None:
        """Let nothing through, in either direction. New connections are accepted but receive nothing."""
        for direction in (self.up, self.down):
            direction.open.clear()
            direction.holds.clear()

    def heal(self) -> None:
        """Let everything through again, at once."""
        for direction in (self.up, self.down):
            direction.delay, direction.rate, direction.allowed = 0.0, None, None
            direction.open.set()

    def forget(self) -> None:
        """Existing connections receive nothing more, not even their end; new connections pass."""
        for link in self._links:
            link.forgotten = True

    def reset(self) -> int:
        """Cut every connection with RST; returns how many."""
        links = list(self._links)
        for link in links:
            link.reset()
        return len(links)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Proxy"]:
        """Listen for as long as the block lasts."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=1024)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            await stop_accepting(server)
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
        task.add_done_callback(lambda _: writer.transport.abort())  # the task may be cancelled before it begins

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

    async def _flow(
        self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        while data := await reader.read(CHUNK):
            if direction.delay:
                await asyncio.sleep(direction.delay)
            if direction.allowed is not None:
                direction.allowed -= 1
                if direction.allowed < 0:
                    direction.open.clear()
            while data:
                if not direction.open.is_set():
                    direction.holds.set()
                await direction.open.wait()
                if link.forgotten:
                    await asyncio.Event().wait()
                part = data if direction.rate is None else data[: max(1, int(direction.rate / STEPS))]
                if direction.rate is not None:
                    await asyncio.sleep(len(part) / direction.rate)
                data = data[len(part) :]
                writer.write(part)
                await writer.drain()
        if link.forgotten:
            await asyncio.Event().wait()
        raise ConnectionResetError
