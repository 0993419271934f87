import asyncio
from itertools import count

from websockets.exceptions import ConnectionClosed
from websockets.frames import Opcode

from daemon.gateway.server import encode
from tests.gateway.peers import SMALL, UPGRADE, fill, request, serving, until


async def test_drain_says_bye_to_each_session_and_closes_with_1012() -> None:
    numbers = count(1)
    async with serving() as served:
        clients = [await served.connect() for _ in range(3)]
        draining = asyncio.create_task(served.gateway.drain(lambda: encode(b"bye %d" % next(numbers)), within=5.0))
        heard = set()
        for client in clients:
            heard.add(await client.recv())
            await client.wait_closed()
            assert client.close_code == 1012
        await draining
        assert heard == {"bye 1", "bye 2", "bye 3"}
        assert served.gateway.connections == 0
        assert served.gateway.sockets == 0
        assert served.gateway.aborted == {}


async def test_drain_takes_another_code_and_needs_no_bye() -> None:
    async with serving() as served:
        peer, _ = await served.open()
        draining = asyncio.create_task(served.gateway.drain(None, code=1001, reason="gone", within=5.0))
        assert await peer.read_frame() == (Opcode.CLOSE, (1001).to_bytes(2, "big") + b"gone")
        await peer.send_frame(Opcode.CLOSE, (1001).to_bytes(2, "big"))
        assert await peer.read_all() == b""
        peer.close()
        await draining


async def test_drain_ends_although_a_client_never_reads() -> None:
    async with serving() as served:
        _, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        await served.gateway.drain(lambda: encode(b"bye"), within=0.05)
        assert recorder.losses == 1
        assert served.gateway.aborted == {"drain_timeout": 1}
        assert served.gateway.sockets == 0


async def test_a_slow_client_gets_all_of_its_backlog_within_the_deadline() -> None:
    async with serving() as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        draining = asyncio.create_task(served.gateway.drain(lambda: encode(b"bye"), within=60.0))
        for _ in range(250):
            assert (await peer.read_frame())[0] is Opcode.TEXT
        assert await peer.read_frame() == (Opcode.TEXT, b"bye")
        assert await peer.read_close() == 1012
        peer.close()
        await draining
        assert served.gateway.aborted == {}


async def test_drain_may_be_asked_for_twice_and_with_nobody_there() -> None:
    async with serving() as served:
        async with served.connect() as client:
            await asyncio.gather(*(served.gateway.drain(lambda: encode(b"bye"), within=5.0) for _ in range(2)))
            assert await client.recv() == "bye"
            try:
                await client.recv()
            except ConnectionClosed as closed:
                assert closed.rcvd is not None
                assert closed.rcvd.code == 1012
        await served.gateway.drain(None)


async def test_nobody_new_is_accepted_during_a_drain() -> None:
    async with serving() as served:
        await served.open()
        draining = asyncio.create_task(served.gateway.drain(None, within=0.1))
        await asyncio.sleep(0)
        try:
            late = await served.raw()
        except ConnectionRefusedError:
            pass
        else:
            assert await late.read_all() == b""
        await draining


async def test_who_is_in_the_middle_of_asking_is_told_to_come_back() -> None:
    async with serving() as served:
        peer = await served.raw()
        await peer.send(request("GET /v1", UPGRADE)[:20])
        await until(lambda: served.gateway.sockets == 1)
        draining = asyncio.create_task(served.gateway.drain(None, within=5.0))
        answer = await peer.read_all()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: " in answer
        peer.close()
        await draining


async def test_who_only_has_connected_or_does_not_close_after_a_page_holds_nobody_up() -> None:
    async with serving() as served:
        await served.raw()
        reader = await served.raw()
        await reader.send(request("GET /"))
        await reader.read_head()
        await until(lambda: served.gateway.sockets == 2)
        await served.gateway.drain(None, within=3600.0)
        assert served.gateway.aborted == {}


async def test_leaving_the_gateways_block_closes_everything() -> None:
    async with serving() as served:
        client = await served.connect()
        recorder = await served.attendants.get()
    await client.wait_closed()
    assert client.close_code == 1012
    assert recorder.losses == 1
