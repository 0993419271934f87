"""A client of the real daemon that reads server-sent events, as the standard says that they are read."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

from daemon.core.frames import EXACTLY

Frame = dict[str, Any]


@dataclass
class Event:
    """One event. `id` is None if it has none."""

    op: str = ""
    id: str | None = None
    retry: str | None = None
    frame: Frame = field(default_factory=dict)


@dataclass
class Stream:
    """A response whose head has been read. Nothing is read that no test asks for.

    `last_id` is what a browser would send to resume.
    """

    connection: socket.socket
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    last_id: str | None = None
    _buffer: bytearray = field(default_factory=bytearray)
    _searched: int = 0

    async def _receive(self) -> bool:
        """More bytes; False at the end."""
        data = await asyncio.get_running_loop().sock_recv(self.connection, 65536)
        self._buffer += data
        return bool(data)

    async def _line(self) -> str:
        """The next line with its end; empty at the end."""
        while (end := self._buffer.find(b"\n", self._searched)) < 0:
            self._searched = len(self._buffer)
            if not await self._receive():
                return ""
        line = self._buffer[: end + 1].decode()
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    async def read_head(self) -> None:
        """Read the status and the headers."""
        self.status = int((await self._line()).split()[1])
        while header := (await self._line()).strip():
            name, _, value = header.partition(": ")
            self.headers[name.lower()] = value

    async def next(self) -> Event | None:
        """The next event that is not a heartbeat; None at the end."""
        event, data = Event(), []
        while line := await self._line():
            name, _, value = line.rstrip("\n").partition(": ")
            match name:
                case "event":
                    event.op = value
                case "id":
                    event.id = self.last_id = value
                case "retry":
                    event.retry = value
                case "data":
                    data.append(value)
                case "" if data and event.op == "head":
                    event, data = Event(), []
                case "" if data:
                    EXACTLY.validate_json("\n".join(data))
                    event.frame = json.loads("\n".join(data))
                    assert event.op == event.frame["op"]
                    return event
        return None

    async def until(self, op: str) -> list[Event]:
        """All events up to and including the next one of this kind."""
        events: list[Event] = []
        while not events or events[-1].op != op:
            event = await self.next()
            assert event is not None, f"the stream ended after {events}"
            events.append(event)
        return events

    async def body(self) -> bytes:
        """What follows, until the end."""
        while await self._receive():
            pass
        return bytes(self._buffer)


@asynccontextmanager
async def event_stream(
    address: tuple[str, int],
    token: str | None,
    *topics: str,
    last_id: str | None = None,
    method: str = "GET",
    receive_buffer: int | None = None,
    **parameters: str,
) -> AsyncIterator[Stream]:
    """Ask for the changes of these topics, and read the head of the response."""
    query = urlencode([*(("topic", topic) for topic in topics), *parameters.items()])
    lines = [f"{method} /v1/stream?{query} HTTP/1.1", "Host: localhost", "Accept: text/event-stream"]
    if token is not None:
        lines.append(f"Authorization: Bearer {token}")
    if last_id is not None:
        lines.append(f"Last-Event-ID: {last_id}")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    stream = Stream(connection)
    with connection:
        await asyncio.get_running_loop().sock_connect(connection, address)
        await asyncio.get_running_loop().sock_sendall(connection, "\r\n".join([*lines, "", ""]).encode())
        await stream.read_head()
        yield stream
