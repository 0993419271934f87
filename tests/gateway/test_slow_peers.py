"""Peers that are silent, slow or asleep. Kernels buffer megabytes for one that does not read: these write more."""

import asyncio

from websockets.frames import Opcode

from daemon.gateway.server import encode
from tests.gateway.peers import LARGE, SMALL, RawPeer, fill, frame, serving, silence, until


async def test_a_client_is_pinged_every_twenty_seconds_and_kept_while_it_answers() -> None:
    async with serving() as served:
        peer, recorder = await served.open()
        for _ in range(3):
            served.pass_time(20)
            assert await peer.read_frame() == (Opcode.PING, b"")
            await peer.send_frame(Opcode.PONG)
            await peer.send_frame(Opcode.TEXT, b"seen")
            assert await peer.read_frame() == (Opcode.TEXT, b"seen")
        assert recorder.losses == 0


async def test_a_silent_client_is_dropped_ten_seconds_after_the_ping() -> None:
    async with serving() as served:
        peer, recorder = await served.open()
        served.pass_time(20)
        assert await peer.read_frame() == (Opcode.PING, b"")
        served.pass_time(9)
        assert served.gateway.aborted == {}
        served.pass_time(1)
        await recorder.gone.wait()
        assert served.gateway.aborted == {"silent": 1}


async def test_anything_that_comes_in_answers_a_ping() -> None:
    async with serving() as served:
        peer, recorder = await served.open()
        served.pass_time(20)
        await peer.send_frame(Opcode.TEXT, b"busy")
        await until(lambda: recorder.texts == [b"busy"])
        served.pass_time(19)
        assert served.gateway.aborted == {}


async def test_a_client_that_takes_nothing_for_thirty_seconds_is_cut_as_too_slow() -> None:
    async with serving() as served:
        _, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        served.pass_time(29)
        assert served.gateway.aborted == {}
        served.pass_time(1)
        assert served.gateway.aborted == {"too_slow": 1}
        await recorder.gone.wait()
        assert recorder.losses == 1
        assert recorder.close == (4408, "too_slow")


async def test_a_client_that_takes_next_to_nothing_is_cut_as_well() -> None:
    async with serving() as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        for _ in range(30):
            await peer.read_some(2000)  # less than 64 KiB in all, and enough for the kernels to move some
            served.pass_time(1)
        assert served.gateway.aborted == {"too_slow": 1}
        await recorder.gone.wait()


async def test_a_client_that_reads_slowly_is_kept_and_gets_everything() -> None:
    async with serving() as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        expected = 250 * len(LARGE)
        taken = 0
        while taken < expected:
            data = await peer.read_some(60_000)
            assert data, served.gateway.aborted
            taken += len(data)
            if taken < expected // 2:  # a second for every 60 KB, and the ping is megabytes behind
                await asyncio.sleep(0)
                served.pass_time(1)
        assert served.clock.now > 1100
        assert served.gateway.aborted == {}


async def read_messages(peer: RawPeer, count: int) -> list[bytes]:
    return [(await peer.read_frame())[1] for _ in range(count)]


async def test_a_client_that_does_not_read_is_cut_and_another_is_undisturbed() -> None:
    async with serving() as served:
        fast, hears = await served.open()
        _, sleeps = await served.open(receive_buffer=SMALL)
        fill(sleeps)
        for number in range(30):
            text = b"%d" % number
            hears.socket.write(encode(text))
            assert await next_text(fast) == text
            served.pass_time(1)
        assert served.gateway.aborted == {"too_slow": 1}
        await sleeps.gone.wait()
        assert served.gateway.connections == 1


async def next_text(peer: RawPeer) -> bytes:
    """The next text; pings on the way are answered."""
    while True:
        opcode, data = await peer.read_frame()
        if opcode is Opcode.TEXT:
            return data
        await peer.send_frame(Opcode.PONG, data)


async def test_a_message_larger_than_every_buffer_arrives_behind_and_before_others() -> None:
    async with serving() as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        texts = [b"first", b"x" * 5_000_000, *(b"%d" % number * 1000 for number in range(100)), b"last"]
        for text in texts:
            recorder.socket.write(encode(text))
        recorder.socket.close(1012, "restart")
        assert await read_messages(peer, len(texts)) == texts
        assert await peer.read_close() == 1012


async def test_drained_returns_at_once_when_little_waits() -> None:
    async with serving() as served:
        _, recorder = await served.open()
        recorder.socket.write(encode(b"little"))
        await recorder.socket.drained()


async def test_drained_waits_until_the_peer_has_read() -> None:
    async with serving() as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        first, second = (asyncio.create_task(recorder.socket.drained()) for _ in range(2))
        await asyncio.sleep(0)
        assert not first.done()
        second.cancel()
        await read_messages(peer, 250)
        await first
        assert recorder.socket.queued() < 2**16


async def test_drained_returns_when_the_peer_is_gone_or_being_closed() -> None:
    async with serving() as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        waiting = asyncio.create_task(recorder.socket.drained())
        await asyncio.sleep(0)
        peer.reset()
        await waiting
        _, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        waiting = asyncio.create_task(recorder.socket.drained())
        await asyncio.sleep(0)
        recorder.socket.close(1012, "restart")
        await waiting


async def test_pings_of_a_client_that_does_not_read_stop_being_read() -> None:
    async with serving(frames=10**9) as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        flood = asyncio.create_task(peer.send(500_000 * frame(Opcode.PING, b"p" * 100)))
        # 53 MB of pings; their pongs would be as much. Paused, the gateway leaves them to the sender.
        paused = recorder.socket._transport  # type: ignore[attr-defined]
        await until(lambda: not paused._reading)
        assert not flood.done()
        assert recorder.socket.queued() < 2**20
        flood.cancel()


async def test_reading_goes_on_when_the_peer_has_read() -> None:
    async with serving(answer=silence) as served:
        peer, recorder = await served.open(receive_buffer=SMALL)
        fill(recorder)
        await peer.send_frame(Opcode.TEXT, b"while full")
        await read_messages(peer, 250)
        await until(lambda: recorder.texts == [b"while full"])
