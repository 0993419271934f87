"""The transport of one socket, between its user and a peer that reads when the test says so."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from daemon.gateway.transport import HIGH_WATER, Transport
from tests.gateway.peers import until


class TransportProtocol:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str | bytes] = []

    def data_received(self, data: bytes) -> None:
        self.told.append(data)

    def eof_received(self) -> None:
        self.told.append("ended")

    def pause_writing(self) -> None:
        self.told.append("filled")

    def resume_writing(self) -> None:
        self.told.append("emptied")

    def connection_lost(self) -> None:
        self.told.append("lost")


class Pair:
    """A transport that reads, its user, and the socket of the peer."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        for end in (ours, self.peer):
            end.setblocking(False)
        self.protocol = TransportProtocol()
        self.transport = Transport(ours)
        self.transport.protocol = self.protocol
        self.transport.resume_reading()

    async def read(self, most: int = 100_000) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.peer, most)

    async def read_all(self) -> bytes:
        found = b""
        while data := await self.read():
            found += data
        return found


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    yield pair
    pair.peer.close()
    pair.transport.abort()
    await until(lambda: "lost" in pair.protocol.told)


CHUNK = bytes(range(256)) * 100


def fill(transport: Transport) -> int:
    """Write until the user is told that the peer is full; how many chunks that took."""
    count = 0
    while transport.queued <= HIGH_WATER:
        transport.write(CHUNK)
        count += 1
    return count


async def test_a_write_that_the_kernel_takes_leaves_nothing_waiting(pair: Pair) -> None:
    assert 0 == pair.transport.write(b"all of it")
    assert b"all of it" == await pair.read()


async def test_what_waits_is_the_very_object_that_was_written(pair: Pair) -> None:
    fill(pair.transport)
    frames = bytes(5000)
    assert pair.transport.write(frames) > len(frames)
    assert pair.transport._queue is not None
    assert pair.transport._queue[-1] is frames


async def test_everything_arrives_in_order_and_the_user_hears_once_of_full_and_empty(pair: Pair) -> None:
    count = fill(pair.transport)
    ends = [b"%d," % number for number in range(1000)]
    for end in ends:
        pair.transport.write(end)
    pair.transport.write_eof()
    assert ["filled"] == pair.protocol.told
    assert count * CHUNK + b"".join(ends) == await pair.read_all()
    assert ["filled", "emptied"] == pair.protocol.told
    assert 0 == pair.transport.queued
    await asyncio.get_running_loop().sock_sendall(pair.peer, b"still heard")
    await until(lambda: pair.protocol.told[-1] == b"still heard")


async def test_a_closed_transport_sends_what_waits_and_then_ends(pair: Pair) -> None:
    count = fill(pair.transport)
    pair.transport.close()
    await asyncio.get_running_loop().sock_sendall(pair.peer, b"not heard any more")
    found = b""
    while len(found) < count * len(CHUNK):
        found += await pair.read()
    assert count * CHUNK == found
    await until(lambda: "lost" in pair.protocol.told)
    assert ["filled", "emptied", "lost"] == pair.protocol.told


async def test_after_an_abort_nothing_is_sent_and_the_end_is_told_once_and_later(pair: Pair) -> None:
    fill(pair.transport)
    pair.transport.abort()
    assert ["filled"] == pair.protocol.told
    assert 0 == pair.transport.write(b"nothing") == pair.transport.queued
    pair.transport.write_eof()
    pair.transport.abort()
    pair.transport.resume_reading()
    await until(lambda: "lost" in pair.protocol.told)
    assert ["filled", "lost"] == pair.protocol.told


@pytest.mark.parametrize("full", [False, True])
async def test_a_peer_that_has_gone_ends_the_transport_at_the_next_write(pair: Pair, *, full: bool) -> None:
    pair.transport.pause_reading()
    if full:
        fill(pair.transport)
    pair.peer.close()
    pair.transport.write(b"to nobody")
    await until(lambda: "lost" in pair.protocol.told)
    assert 1 == pair.protocol.told.count("lost")


async def test_a_peer_that_says_no_more_is_sent_what_waits(pair: Pair) -> None:
    count = fill(pair.transport)
    pair.peer.shutdown(socket.SHUT_WR)
    await until(lambda: "ended" in pair.protocol.told)
    assert count * CHUNK == await pair.read_all()
    assert ["filled", "ended", "emptied", "lost"] == pair.protocol.told


async def test_a_user_that_raises_costs_its_own_peer_the_connection_and_is_logged(pair: Pair) -> None:
    def data_received(data: bytes) -> None:
        raise RuntimeError("a bug")

    pair.protocol.data_received = data_received  # type: ignore[method-assign]
    with capture_logs() as lines:
        await asyncio.get_running_loop().sock_sendall(pair.peer, b"hello")
        assert b"" == await pair.read_all()
    assert ["internal_error"] == [line["event"] for line in lines]
    assert ["lost"] == pair.protocol.told
