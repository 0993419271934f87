"""The transport, with a protocol that records and a peer that reads when the test does."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextvars import Context, copy_context

import pytest
from structlog.testing import capture_logs

from daemon.gateway.transport import HIGH_WATER, Transport
from daemon.logs import correlate
from tests.gateway.peers import until


class RecordingProtocol:
    """Records its calls by name, and received data as it is."""

    def __init__(self) -> None:
        self.calls: list[str | bytes] = []

    def data_received(self, data: bytes) -> None:
        self.calls.append(data)

    def eof_received(self) -> None:
        self.calls.append("eof_received")

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")

    def connection_lost(self) -> None:
        self.calls.append("connection_lost")


class Pair:
    """A transport that reads, its protocol, and the socket of its peer."""

    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        for end in (ours, self.peer):
            end.setblocking(False)
        self.protocol = RecordingProtocol()
        self.transport = Transport(ours)
        self.transport.protocol = self.protocol
        self.transport.resume_reading()

    async def read(self, limit: int = 100_000) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.peer, limit)

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
    await until(lambda: "connection_lost" in pair.protocol.calls)


CHUNK = bytes(range(256)) * 100


def fill(transport: Transport) -> int:
    """Write chunks until writing is paused. Returns how many."""
    count = 0
    while transport.queued <= HIGH_WATER:
        transport.write(CHUNK)
        count += 1
    return count


async def test_a_write_that_the_kernel_takes_leaves_nothing_queued(pair: Pair) -> None:
    assert 0 == pair.transport.write(b"all of it")
    assert b"all of it" == await pair.read()


async def test_queued_data_is_the_very_object_that_was_written(pair: Pair) -> None:
    fill(pair.transport)
    frames = bytes(5000)
    assert pair.transport.write(frames) > len(frames)
    assert pair.transport._queue is not None
    assert pair.transport._queue[-1] is frames


async def test_everything_arrives_in_order_and_writing_pauses_and_resumes_once(pair: Pair) -> None:
    count = fill(pair.transport)
    ends = [b"%d," % number for number in range(1000)]
    for end in ends:
        pair.transport.write(end)
    pair.transport.write_eof()
    assert ["pause_writing"] == pair.protocol.calls
    assert count * CHUNK + b"".join(ends) == await pair.read_all()
    assert ["pause_writing", "resume_writing"] == pair.protocol.calls
    assert 0 == pair.transport.queued
    await asyncio.get_running_loop().sock_sendall(pair.peer, b"still heard")
    await until(lambda: pair.protocol.calls[-1] == b"still heard")


async def test_a_closed_transport_sends_its_queue_and_then_ends(pair: Pair) -> None:
    count = fill(pair.transport)
    pair.transport.close()
    await asyncio.get_running_loop().sock_sendall(pair.peer, b"not heard any more")
    found = b""
    while len(found) < count * len(CHUNK):
        found += await pair.read()
    assert count * CHUNK == found
    await until(lambda: "connection_lost" in pair.protocol.calls)
    assert ["pause_writing", "resume_writing", "connection_lost"] == pair.protocol.calls


async def test_after_an_abort_nothing_is_sent_and_connection_lost_follows_once(pair: Pair) -> None:
    fill(pair.transport)
    pair.transport.abort()
    assert ["pause_writing"] == pair.protocol.calls
    assert 0 == pair.transport.write(b"nothing") == pair.transport.queued
    pair.transport.write_eof()
    pair.transport.abort()
    pair.transport.resume_reading()
    await until(lambda: "connection_lost" in pair.protocol.calls)
    assert ["pause_writing", "connection_lost"] == pair.protocol.calls


@pytest.mark.parametrize("full", [False, True])
async def test_a_write_to_a_disconnected_peer_ends_the_transport(pair: Pair, *, full: bool) -> None:
    pair.transport.pause_reading()
    if full:
        fill(pair.transport)
    pair.peer.close()
    pair.transport.write(b"to nobody")
    await until(lambda: "connection_lost" in pair.protocol.calls)
    assert 1 == pair.protocol.calls.count("connection_lost")


async def test_a_peer_that_half_closes_still_gets_the_queue(pair: Pair) -> None:
    count = fill(pair.transport)
    pair.peer.shutdown(socket.SHUT_WR)
    await until(lambda: "eof_received" in pair.protocol.calls)
    assert count * CHUNK == await pair.read_all()
    assert ["pause_writing", "eof_received", "resume_writing", "connection_lost"] == pair.protocol.calls


async def test_a_protocol_that_raises_is_logged_and_loses_its_connection(pair: Pair) -> None:
    def data_received(data: bytes) -> None:
        raise RuntimeError("a bug")

    pair.protocol.data_received = data_received  # type: ignore[method-assign]
    with capture_logs() as lines:
        await asyncio.get_running_loop().sock_sendall(pair.peer, b"hello")
        assert b"" == await pair.read_all()
    assert ["internal_error"] == [line["event"] for line in lines]
    assert ["connection_lost"] == pair.protocol.calls


async def test_what_is_read_has_nothing_of_the_context_in_which_reading_began(pair: Pair) -> None:
    found: list[Context] = []

    def data_received(data: bytes) -> None:
        found.append(copy_context())

    pair.protocol.data_received = data_received  # type: ignore[method-assign]
    pair.transport.pause_reading()
    with correlate("01JSESSION"):  # as of a client that lets the next one in
        pair.transport.resume_reading()
    await asyncio.get_running_loop().sock_sendall(pair.peer, b"hello")
    await until(lambda: bool(found))
    assert {} == dict(found[0])
