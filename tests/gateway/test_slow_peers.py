"""Silent and slow peers. Kernels buffer megabytes for a peer that does not read, so these tests write more."""

import asyncio

from websockets.frames import Opcode

from daemon.gateway.acceptor import USER_TIMEOUT
from daemon.gateway.limits import Limits
from daemon.gateway.server import encode
from tests.gateway.peers import LARGE, SMALL, RawPeer, fill, frame, serving, silence, until


async def test_a_client_is_pinged_every_twenty_seconds_and_kept_while_it_answers() -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        for _ in range(3):
            server.pass_time(20)
            assert await peer.read_frame() == (Opcode.PING, b"")
            await peer.send_frame(Opcode.PONG)
            await peer.send_frame(Opcode.TEXT, b"seen")
            assert await peer.read_frame() == (Opcode.TEXT, b"seen")
        assert recorder.losses == 0


async def test_a_silent_client_is_dropped_ten_seconds_after_the_ping() -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        server.pass_time(20)
        assert await peer.read_frame() == (Opcode.PING, b"")
        server.pass_time(9)
        assert server.gateway.aborted == {}
        server.pass_time(1)
        await recorder.lost.wait()
        assert server.gateway.aborted == {"silent": 1}


async def test_any_frame_counts_as_an_answer_to_a_ping() -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        server.pass_time(20)
        await peer.send_frame(Opcode.TEXT, b"busy")
        await until(lambda: recorder.texts == [b"busy"])
        server.pass_time(19)
        assert server.gateway.aborted == {}


async def test_a_client_that_reads_nothing_for_thirty_seconds_is_cut_as_too_slow() -> None:
    async with serving() as server:
        _, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        server.pass_time(29)
        assert server.gateway.aborted == {}
        server.pass_time(1)
        assert server.gateway.aborted == {"too_slow": 1}
        await recorder.lost.wait()
        assert recorder.losses == 1
        assert recorder.close == (4408, "too_slow")


async def test_the_kernel_keeps_little_for_a_peer_that_does_not_read() -> None:
    async with serving() as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        assert 250 * len(LARGE) - recorder.socket.queued() < 2**19
        server.pass_time(30)
        await recorder.lost.wait()
        assert len(await peer.read_all()) < 2**17  # the rest was dropped with the connection
        assert peer.was_reset


async def test_a_client_that_reads_almost_nothing_is_cut_as_too_slow() -> None:
    async with serving() as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        for _ in range(30):
            await peer.read_some(2000)  # less than 64 KiB in all, but enough for the kernels to move some data
            server.pass_time(1)
        assert server.gateway.aborted == {"too_slow": 1}
        await recorder.lost.wait()


async def test_a_client_that_reads_slowly_is_kept_and_gets_everything() -> None:
    async with serving() as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        expected = 250 * len(LARGE)
        taken = 0
        while taken < expected:
            data = await peer.read_some(60_000)
            assert data, server.gateway.aborted
            taken += len(data)
            if taken < expected // 2:  # one second per 60 KB, with the ping megabytes behind
                await asyncio.sleep(0)
                server.pass_time(1)
        assert server.clock.now > 1100
        assert server.gateway.aborted == {}


async def read_messages(peer: RawPeer, count: int) -> list[bytes]:
    return [(await peer.read_frame())[1] for _ in range(count)]


async def test_a_client_that_does_not_read_is_cut_and_another_is_undisturbed() -> None:
    async with serving() as server:
        fast, fast_recorder = await server.open()
        _, slow_recorder = await server.open(receive_buffer=SMALL)
        fill(slow_recorder)
        for number in range(30):
            text = b"%d" % number
            fast_recorder.socket.write(encode(text))
            assert await next_text(fast) == text
            server.pass_time(1)
        assert server.gateway.aborted == {"too_slow": 1}
        await slow_recorder.lost.wait()
        assert server.gateway.connections == 1


async def next_text(peer: RawPeer) -> bytes:
    """The next text message. Answers pings that precede it."""
    while True:
        opcode, data = await peer.read_frame()
        if opcode is Opcode.TEXT:
            return data
        await peer.send_frame(Opcode.PONG, data)


async def test_a_message_larger_than_every_buffer_arrives_in_order() -> None:
    async with serving() as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        texts = [b"first", b"x" * 5_000_000, *(b"%d" % number * 1000 for number in range(100)), b"last"]
        for text in texts:
            recorder.socket.write(encode(text))
        recorder.socket.close(1012, "restart")
        assert await read_messages(peer, len(texts)) == texts
        assert await peer.read_close() == 1012


async def test_drained_returns_at_once_when_little_is_queued() -> None:
    async with serving() as server:
        _, recorder = await server.open()
        recorder.socket.write(encode(b"little"))
        await recorder.socket.drained()


async def test_drained_waits_until_the_peer_has_read() -> None:
    async with serving() as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        first, second = (asyncio.create_task(recorder.socket.drained()) for _ in range(2))
        await asyncio.sleep(0)
        assert not first.done()
        second.cancel()
        await read_messages(peer, 250)
        await first
        assert recorder.socket.queued() < 2**16


async def test_drained_returns_when_the_peer_disconnects_or_is_closed() -> None:
    async with serving() as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        waiting = asyncio.create_task(recorder.socket.drained())
        await asyncio.sleep(0)
        peer.reset()
        await waiting
        _, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        waiting = asyncio.create_task(recorder.socket.drained())
        await asyncio.sleep(0)
        recorder.socket.close(1012, "restart")
        await waiting


async def test_the_gateway_stops_reading_pings_of_a_client_that_does_not_read() -> None:
    async with serving(frames=10**9) as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        flood = asyncio.create_task(peer.send(500_000 * frame(Opcode.PING, b"p" * 100)))
        # 53 MB of pings, which would get as much in pongs. A gateway that stops reading leaves them with the sender.
        transport = recorder.socket._transport  # type: ignore[attr-defined]
        await until(lambda: not transport._reading)
        assert not flood.done()
        assert recorder.socket.queued() < 2**20
        flood.cancel()


async def test_the_gateway_reads_again_once_the_peer_has_read() -> None:
    async with serving(answer=silence) as server:
        peer, recorder = await server.open(receive_buffer=SMALL)
        fill(recorder)
        await peer.send_frame(Opcode.TEXT, b"while full")
        await read_messages(peer, 250)
        await until(lambda: recorder.texts == [b"while full"])


async def test_connections_of_a_user_that_leave_too_much_unread_are_cut_and_others_stay() -> None:
    async with serving(user_unread_bytes=40_000_000) as server:
        _, reading = await server.open()
        sleeping = [(await server.open(SMALL))[1] for _ in range(4)]
        for recorder in sleeping:
            fill(recorder)  # 16 MB
        server.pass_time(2)
        await until(lambda: server.gateway.connections == 3)
        assert server.gateway.aborted == {"user_unread": 2}
        assert 2 == sum(recorder.close == (4408, "too_slow") for recorder in sleeping)
        assert reading.losses == 0
        server.pass_time(5)
        assert server.gateway.aborted == {"user_unread": 2}, "it is little enough now"


def test_the_kernel_gives_a_peer_up_later_than_the_drain_timeout_may_take() -> None:
    assert USER_TIMEOUT / 1000 >= 2 * Limits().drain_timeout + 20
