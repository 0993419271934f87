import asyncio
from itertools import count

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode

from daemon.gateway import server as gateway_server
from daemon.gateway.server import encode
from tests.gateway.peers import SMALL, UPGRADE, fill, request, serving, until


async def test_drain_says_bye_to_each_session_and_closes_with_1012() -> None:
    numbers = count(1)
    async with serving() as server:
        clients = [await server.connect() for _ in range(3)]
        draining = asyncio.create_task(server.gateway.drain(lambda: encode(b"bye %d" % next(numbers)), within=5.0))
        received = set()
        for client in clients:
            received.add(await client.recv())
            await client.wait_closed()
            assert client.close_code == 1012
        await draining
        assert received == {"bye 1", "bye 2", "bye 3"}
        assert server.gateway.connections == 0
        assert server.gateway.sockets == 0
        assert server.gateway.aborted == {}


async def test_drain_closes_a_slice_of_the_sessions_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_server, "TICK_BATCH", 2)
    said, turn = list[int](), 0

    async def take_turns() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    def bye() -> bytes:
        said.append(turn)
        return encode(b"bye")

    async with serving() as server:
        clients = [await server.connect() for _ in range(5)]
        turns = asyncio.create_task(take_turns())
        await asyncio.gather(server.gateway.drain(bye, within=5.0), *(client.wait_closed() for client in clients))
        turns.cancel()
    assert said[0] == said[1] < said[2] == said[3] < said[4]
    assert [1012] * 5 == [client.close_code for client in clients]


async def test_drain_takes_another_code_and_needs_no_bye() -> None:
    async with serving() as server:
        peer, _ = await server.open()
        draining = asyncio.create_task(server.gateway.drain(None, code=1001, reason="gone", within=5.0))
        assert await peer.read_frame() == (Opcode.CLOSE, (1001).to_bytes(2, "big") + b"gone")
        await peer.send_frame(Opcode.CLOSE, (1001).to_bytes(2, "big"))
        assert await peer.read_all() == b""
        peer.close()
        await draining


async def test_drain_ends_even_if_a_client_never_reads() -> None:
    async with serving() as server:
        _, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        await server.gateway.drain(lambda: encode(b"bye"), within=0.05)
        assert recorder.losses == 1
        assert server.gateway.aborted == {"drain_timeout": 1}
        assert server.gateway.sockets == 0


async def test_a_slow_client_gets_all_of_its_backlog_within_the_deadline() -> None:
    async with serving() as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        draining = asyncio.create_task(server.gateway.drain(lambda: encode(b"bye"), within=60.0))
        for _ in range(250):
            assert (await peer.read_frame())[0] is Opcode.TEXT
        assert await peer.read_frame() == (Opcode.TEXT, b"bye")
        assert await peer.read_close() == 1012
        peer.close()
        await draining
        assert server.gateway.aborted == {}


async def test_drain_may_be_called_twice_and_without_clients() -> None:
    async with serving() as server:
        async with server.connect() as client:
            await asyncio.gather(*(server.gateway.drain(lambda: encode(b"bye"), within=5.0) for _ in range(2)))
            assert await client.recv() == "bye"
            try:
                await client.recv()
            except ConnectionClosed as closed:
                assert closed.rcvd is not None
                assert closed.rcvd.code == 1012
        await server.gateway.drain(None)


async def test_no_new_client_is_accepted_during_a_drain() -> None:
    async with serving() as server:
        await server.open()
        draining = asyncio.create_task(server.gateway.drain(None, within=0.1))
        await asyncio.sleep(0)
        try:
            late = await server.raw()
        except ConnectionRefusedError:
            pass
        else:
            assert await late.read_all() == b""
        await draining


async def test_an_unfinished_request_is_answered_with_503_during_a_drain() -> None:
    async with serving() as server:
        peer = await server.raw()
        await peer.send(request("GET /v1", UPGRADE)[:20])
        await until(lambda: server.gateway.sockets == 1)
        draining = asyncio.create_task(server.gateway.drain(None, within=5.0))
        answer = await peer.read_all()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: " in answer
        peer.close()
        await draining


async def test_idle_connections_and_unclosed_pages_do_not_delay_a_drain() -> None:
    async with serving() as server:
        await server.raw()
        reader = await server.raw()
        await reader.send(request("GET /"))
        await reader.read_head()
        await until(lambda: server.gateway.sockets == 2)
        await server.gateway.drain(None, within=3600.0)
        assert server.gateway.aborted == {}


async def test_leaving_the_gateways_block_closes_everything() -> None:
    async with serving() as server:
        client = await server.connect()
        recorder = await server.handlers.get()
    await client.wait_closed()
    assert client.close_code == 1012
    assert recorder.losses == 1
