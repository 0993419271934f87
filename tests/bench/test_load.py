"""The load client, in C and in Python, against servers that send exactly what a test wants."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from bench.experiments import floor
from bench.load import Load, compiler, load
from bench.rig import MeasurementError
from daemon.gateway.framing import encode

ANSWER = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
IN_C = pytest.mark.parametrize("in_c", [True, False], ids=["C", "Python"])
HELLO, FIRST, SECOND = '{"op":"hello"}', '{"op":"subscribe","id":1}', '{"op":"subscribe","id":2}'

Handler = Callable[[ServerConnection], Awaitable[None]]


def row(stamp: int) -> bytes:
    """A message as it appears in the frame of any peer."""
    return b'{"id":"x","content":"@%d and some more words"}' % stamp


@asynccontextmanager
async def clients_of(handle: Handler, count: int, *frames: str, in_c: bool, **options: Any) -> AsyncIterator[Load]:
    """Load clients of a server that runs `handle` for each connection."""
    async with serve(handle, "127.0.0.1", 0, compression=None, **options) as server:
        port = server.sockets[0].getsockname()[1]
        async with load(port, [frames] * count, in_c=in_c) as clients:
            yield clients


@IN_C
async def test_the_load_client_counts_every_row_and_frame_it_receives(in_c: bool) -> None:
    frames = [row(n) * size for n, size in enumerate([1, 2, 3, 700])] + [b'{"op":"head"}', b"x" * 70_000]

    async def handle(connection: ServerConnection) -> None:
        for frame in frames:
            await connection.send(frame.decode())
        await connection.wait_closed()

    async with clients_of(handle, 7, in_c=in_c) as clients:
        await clients.open(2)
        await clients.until(706)
        assert 2 == (await clients.mark()).clients
        await clients.open()
        mark = await clients.received(7 * 706)
        while mark.frames < 7 * len(frames):
            mark = await clients.mark()
    assert (7, 7 * 706, 7 * len(frames)) == (mark.clients, mark.rows, mark.frames)
    assert mark.bytes > 7 * sum(map(len, frames))


@IN_C
async def test_rows_are_counted_however_the_stream_is_split(in_c: bool) -> None:
    stream = b"".join(encode(row(1_000_000 + n) + b"@") for n in range(40))

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ANSWER + stream[:5])
        place, size = 5, 0
        while place < len(stream):
            size = size % 23 + 1
            writer.write(stream[place : place + size])
            await writer.drain()
            await asyncio.sleep(0)
            place += size
        await reader.read()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        async with load(server.sockets[0].getsockname()[1], [()], in_c=in_c) as clients:
            await clients.open()
            await clients.until(40)
            mark = await clients.received(40)
        assert (40, 40) == (mark.rows, mark.sampled)
        assert mark.p50 > 4000, "the timestamps are from the beginning of 1970"


@IN_C
async def test_a_client_sends_its_first_frame_and_the_others_after_the_answer(in_c: bool) -> None:
    received: list[str] = []

    async def handle(connection: ServerConnection) -> None:
        received.append(str(await connection.recv()))
        await connection.send('{"op":"head"}')
        await connection.ping()
        await connection.send('{"op":"welcome"}')
        for _ in range(2):
            received.append(str(await connection.recv()))
            await connection.send('{"op":"subscribed"}')
        await connection.wait_closed()

    async with clients_of(handle, 1, HELLO, FIRST, SECOND, in_c=in_c) as clients:
        await clients.open()
    assert [HELLO, FIRST, SECOND] == received


@IN_C
async def test_clients_that_have_connected_ask_together_at_a_command(in_c: bool) -> None:
    received: list[str] = []

    async def handle(connection: ServerConnection) -> None:
        received.append(str(await connection.recv()))
        await connection.send('{"op":"welcome"}')
        received.append(str(await connection.recv()))
        await connection.send(row(1).decode())
        await connection.wait_closed()

    async with clients_of(handle, 3, HELLO, FIRST, in_c=in_c) as clients:
        await clients.connect()
        assert [HELLO] * 3 == received
        assert 0 == (await clients.mark()).rows
        await clients.ask()
        await clients.until(1)
        assert 3 == (await clients.mark()).clients
    assert [HELLO] * 3 + [FIRST] * 3 == received


async def test_a_paused_load_client_reads_once_something_has_arrived_for_each_client() -> None:
    connections: list[ServerConnection] = []

    async def handle(connection: ServerConnection) -> None:
        connections.append(connection)
        await connection.wait_closed()

    async with clients_of(handle, 3, in_c=True) as clients:
        await clients.open()
        for rows in (1, 2):
            await clients.pause()
            arrival = asyncio.create_task(clients.gather(rows))
            for connection in connections[:2]:
                await connection.send(row(rows).decode())
            began = time.monotonic_ns()
            await connections[2].send(row(rows).decode())
            assert began < await arrival < time.monotonic_ns()
            assert 3 * rows == (await clients.received(3 * rows)).rows


async def test_a_load_client_that_has_gathered_goes_on_reading_until_it_has_all_rows() -> None:
    async def handle(connection: ServerConnection) -> None:
        await connection.recv()
        await connection.send('{"op":"welcome"}')
        await connection.recv()
        await (await connection.ping())  # it answers once it reads
        await connection.send(row(1).decode())
        await connection.wait_closed()

    async with clients_of(handle, 2, HELLO, FIRST, in_c=True) as clients:
        await clients.connect()
        await clients.pause()
        await clients.ask()
        await clients.gather(1)
        assert 2 == (await clients.received(2)).rows


@IN_C
async def test_the_load_client_answers_the_pings_of_the_server(in_c: bool) -> None:
    async def handle(connection: ServerConnection) -> None:
        await (await connection.ping(b"are you there"))
        await connection.send(row(1).decode())
        await connection.wait_closed()

    async with clients_of(handle, 1, in_c=in_c) as clients:
        await clients.open()
        assert 1 == (await clients.received(1)).rows


async def send_an_error(connection: ServerConnection) -> None:
    await connection.recv()
    await connection.send('{"op":"error","code":"no_such_topic"}')
    await connection.wait_closed()


async def close_at_once(connection: ServerConnection) -> None:
    await connection.close(4401, "token")


async def hang_up(connection: ServerConnection) -> None:
    connection.transport.abort()


@IN_C
@pytest.mark.parametrize(
    ("handle", "why"),
    [(send_an_error, "no_such_topic"), (close_at_once, "closed with 4401: token"), (hang_up, "lost its connection")],
)
async def test_a_client_that_is_not_served_fails_the_measurement(handle: Handler, why: str, in_c: bool) -> None:
    async with clients_of(handle, 1, HELLO, in_c=in_c) as clients:
        with pytest.raises(MeasurementError, match=why):
            await clients.open()
            await clients.until(1)


@IN_C
async def test_a_refused_handshake_fails_the_measurement(in_c: bool) -> None:
    def full(connection: ServerConnection, _request: Request) -> Response:
        return connection.respond(503, "full\n")

    async with clients_of(close_at_once, 1, in_c=in_c, process_request=full) as clients:
        with pytest.raises(MeasurementError, match=r"refused: HTTP/1\.1 503"):
            await clients.open()


async def test_more_rows_than_were_written_fail_the_measurement() -> None:
    async def handle(connection: ServerConnection) -> None:
        await connection.send((row(1) * 2).decode())
        await connection.wait_closed()

    async with clients_of(handle, 1, in_c=True) as clients:
        await clients.open()
        await clients.until(2)
        with pytest.raises(MeasurementError, match="1 rows should have arrived, and 2 did"):
            await clients.received(1)


async def test_the_c_loop_sends_what_the_load_client_counts() -> None:
    if compiler() is None:
        with pytest.raises(MeasurementError, match="there is no C compiler"):
            await floor(5, 300, 3, 0, 20)
    else:
        assert await floor(5, 300, 3, 0, 20) > 0  # it raises if one row more or less comes in
