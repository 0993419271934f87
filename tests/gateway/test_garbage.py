"""A connection that has ended leaves no reference cycles behind."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator

import pytest
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side

from daemon.gateway.connection import WebSocketConnection
from daemon.gateway.handshake import Handshake
from daemon.gateway.transport import Transport
from tests.gateway.peers import Server, serving, until


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def live_objects() -> list[object]:
    """The gateway's objects that are still alive, for any connection."""
    return [
        obj
        for obj in gc.get_objects()
        if type(obj) in {WebSocketConnection, Handshake, Transport}
        or (issubclass(type(obj), Protocol) and obj.side is Side.SERVER)
    ]


async def closes(server: Server) -> None:
    async with server.connect():
        assert 3 == len(live_objects())


async def resets(server: Server) -> None:
    peer, _ = await server.open()
    peer.reset()


async def disconnects(server: Server) -> None:
    peer, _ = await server.open()
    await peer.send_frame(Opcode.TEXT, b"to be answered")
    peer.close()


async def violates_the_protocol(server: Server) -> None:
    peer, _ = await server.open()
    await peer.send_frame(Opcode.BINARY, b"no text")
    assert 1003 == await peer.read_close()
    peer.close()


async def requests_a_page(server: Server) -> None:
    peer = await server.raw()
    await peer.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    await peer.read_all()
    peer.close()


async def is_closed_by_the_server(server: Server) -> None:
    async with server.connect() as client:
        recorder = await server.handlers.get()
        recorder.socket.close(4401, "bad_token")
        await client.wait_closed()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize(
    "peer", [closes, resets, disconnects, violates_the_protocol, requests_a_page, is_closed_by_the_server]
)
async def test_a_closed_connection_leaves_nothing_for_the_garbage_collector(
    peer: Callable[[Server], Awaitable[None]],
) -> None:
    async with serving() as server:
        await peer(server)
        await until(lambda: server.gateway.sockets == 0)
        while not server.handlers.empty():
            server.handlers.get_nowait()
        await asyncio.sleep(0)  # lets the iteration that removed the last connection finish
        assert [] == live_objects()
