"""What is left of a peer that has gone: nothing that would wait for the garbage collector."""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Iterator

import pytest
from websockets.frames import Opcode
from websockets.protocol import Protocol, Side

from daemon.gateway.connection import WebSocketConnection
from daemon.gateway.handshake import Handshake
from daemon.gateway.transport import Transport
from tests.gateway.peers import Served, serving, until


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def remains() -> list[object]:
    """What the gateway still has for any peer."""
    return [
        thing
        for thing in gc.get_objects()
        if type(thing) in {WebSocketConnection, Handshake, Transport}
        or (type(thing) is Protocol and thing.side is Side.SERVER)
    ]


async def says_goodbye(served: Served) -> None:
    async with served.connect():
        assert 3 == len(remains())


async def breaks_off(served: Served) -> None:
    peer, _ = await served.open()
    peer.reset()


async def ends_its_side(served: Served) -> None:
    peer, _ = await served.open()
    await peer.send_frame(Opcode.TEXT, b"to be answered")
    peer.close()


async def breaks_the_rules(served: Served) -> None:
    peer, _ = await served.open()
    await peer.send_frame(Opcode.BINARY, b"no text")
    assert 1003 == await peer.read_close()
    peer.close()


async def asks_for_a_page(served: Served) -> None:
    peer = await served.raw()
    await peer.send(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    await peer.read_all()
    peer.close()


async def is_sent_away(served: Served) -> None:
    async with served.connect() as client:
        recorder = await served.attendants.get()
        recorder.socket.close(4401, "bad_token")
        await client.wait_closed()


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize(
    "peer", [says_goodbye, breaks_off, ends_its_side, breaks_the_rules, asks_for_a_page, is_sent_away]
)
async def test_a_peer_that_has_gone_leaves_nothing_to_the_garbage_collector(
    peer: Callable[[Served], Awaitable[None]],
) -> None:
    async with serving() as served:
        await peer(served)
        await until(lambda: served.gateway.sockets == 0)
        while not served.attendants.empty():
            served.attendants.get_nowait()
        await asyncio.sleep(0)  # the turn in which the last one went ends
        assert [] == remains()
