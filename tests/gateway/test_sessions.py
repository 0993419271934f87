import asyncio
from collections.abc import Callable

import pytest
from ulid import ULID
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Frame, Opcode

from daemon.gateway.server import TICK_BATCH, encode
from daemon.metrics import REGISTRY
from tests.gateway.peers import Recorder, frame, serving, silence, until


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 1_000_000])
def test_encode_makes_one_final_unmasked_text_frame(size: int) -> None:
    payload = b"x" * size
    encoded = encode(payload)
    assert encoded == Frame(Opcode.TEXT, payload).serialize(mask=False)
    assert encoded[0] == 0x81
    assert encoded.endswith(payload)


async def test_a_message_reaches_the_handler_and_its_reply_comes_back() -> None:
    async with serving() as server, server.connect() as client:
        await client.send("grüß dich")
        assert await client.recv() == "grüß dich"
        recorder = await server.handlers.get()
        assert recorder.texts == ["grüß dich".encode()]


async def test_every_connection_has_its_own_ulid() -> None:
    async with serving() as server, server.connect(), server.connect():
        first = (await server.handlers.get()).socket.session
        second = (await server.handlers.get()).socket.session
        assert first != second
        assert str(ULID.from_str(first)) == first


async def test_many_frames_of_one_write_arrive_in_order() -> None:
    async with serving() as server, server.connect() as client:
        recorder = await server.handlers.get()
        recorder.socket.write(b"".join(encode(b"%d" % number) for number in range(1000)))
        assert [await client.recv() for _ in range(1000)] == [str(number) for number in range(1000)]


async def test_a_message_of_a_megabyte_arrives_whole() -> None:
    async with serving() as server, server.connect(max_size=None) as client:
        recorder = await server.handlers.get()
        recorder.socket.write(encode(b"m" * 2**20))
        assert await client.recv() == "m" * 2**20


async def test_fragments_are_joined_and_a_ping_between_them_is_answered() -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        whole = "ein Stück für dich".encode()
        await peer.send_frame(Opcode.TEXT, whole[:7], fin=False)
        await peer.send_frame(Opcode.PING, b"there?")
        await peer.send_frame(Opcode.CONT, whole[7:8], fin=False)  # the cut goes through the ü
        await peer.send_frame(Opcode.CONT, whole[8:])
        assert await peer.read_frame() == (Opcode.PONG, b"there?")
        assert await peer.read_frame() == (Opcode.TEXT, whole)
        assert recorder.texts == [whole]


async def test_a_frame_may_arrive_byte_by_byte() -> None:
    async with serving() as server:
        peer, _ = await server.open()
        for byte in frame(Opcode.TEXT, b"slow"):
            await peer.send(bytes([byte]))
        assert await peer.read_frame() == (Opcode.TEXT, b"slow")


async def test_a_message_of_the_maximum_size_is_accepted() -> None:
    async with serving() as server, server.connect() as client:
        await client.send("x" * 65536)
        assert await client.recv() == "x" * 65536


def masked(first: int, second: int, rest: bytes = b"") -> bytes:
    return bytes([first, second]) + rest


VIOLATIONS = {
    "an unmasked frame": (encode(b"hello"), 1002),
    "a reserved opcode": (masked(0x83, 0x80, bytes(4)), 1002),
    "a reserved bit": (masked(0xC1, 0x80, bytes(4)), 1002),
    "a ping of 126 bytes": (masked(0x89, 0xFE, b"\0\x7e" + bytes(4) + bytes(126)), 1002),
    "a fragmented ping": (masked(0x09, 0x80, bytes(4)), 1002),
    "a continuation of nothing": (frame(Opcode.CONT, b"?"), 1002),
    "a text frame inside a message": (frame(Opcode.TEXT, b"a", fin=False) + frame(Opcode.TEXT, b"b"), 1002),
    "a close frame of one byte": (masked(0x88, 0x81, bytes(5)), 1002),
    "an invalid close code": (frame(Opcode.CLOSE, (999).to_bytes(2, "big")), 1002),
    "a binary message": (frame(Opcode.BINARY, b"\0\1"), 1003),
    "a binary fragment": (frame(Opcode.BINARY, b"\0\1", fin=False), 1003),
    "text that is not UTF-8": (frame(Opcode.TEXT, b"caf\xe9"), 1007),
    "a surrogate": (frame(Opcode.TEXT, b"\xed\xa0\x80"), 1007),
    "half a character at the end": (frame(Opcode.TEXT, b"\xc3", fin=False) + frame(Opcode.CONT, b""), 1007),
    "a close reason that is not UTF-8": (frame(Opcode.CLOSE, b"\x03\xe8\xff"), 1007),
    "one byte too many": (frame(Opcode.TEXT, b"x" * 65537), 1009),
    "two megabytes": (frame(Opcode.TEXT, b"x" * 2_000_000), 1009),
    "a length of 2^62": (masked(0x81, 0xFF, (2**62).to_bytes(8, "big") + bytes(4)), 1009),
    "two fragments that are too big together": (
        frame(Opcode.TEXT, b"x" * 65536, fin=False) + frame(Opcode.CONT, b"x"),
        1009,
    ),
    "too many fragments": (
        frame(Opcode.TEXT, b"", fin=False) + 200 * frame(Opcode.CONT, b"", fin=False),
        1009,
    ),
}


@pytest.mark.parametrize(("sent", "code"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
async def test_a_violation_closes_with_its_code_and_disturbs_no_other_client(sent: bytes, code: int) -> None:
    async with serving() as server, server.connect() as bystander:
        await server.handlers.get()
        peer, recorder = await server.open()
        await peer.send(sent)
        assert await peer.read_close() == code
        assert await peer.read_all() == b""
        peer.close()
        await recorder.lost.wait()
        assert recorder.texts == []
        assert recorder.losses == 1
        await bystander.send("undisturbed")
        assert await bystander.recv() == "undisturbed"


async def test_messages_before_a_violation_are_answered_before_the_close() -> None:
    async with serving() as server:
        peer, _ = await server.open()
        await peer.send(frame(Opcode.TEXT, b"good") + frame(Opcode.BINARY, b"bad") + frame(Opcode.TEXT, b"late"))
        assert await peer.read_frame() == (Opcode.TEXT, b"good")
        assert await peer.read_close() == 1003
        assert await peer.read_all() == b""


async def test_a_message_sent_along_with_a_close_frame_is_answered_before_the_close() -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        await peer.send(frame(Opcode.TEXT, b"last words") + frame(Opcode.CLOSE, b"\x03\xe8"))
        assert await peer.read_frame() == (Opcode.TEXT, b"last words")
        assert await peer.read_close() == 1000
        peer.close()
        await recorder.lost.wait()


async def test_a_library_client_that_sends_too_much_sees_1009() -> None:
    before = REGISTRY.get_sample_value("rowcast_closed_total", {"code": "1009"}) or 0.0
    async with serving(message_bytes=1_000_000) as server, server.connect() as client:
        await client.send("x" * 1_000_000)
        assert await client.recv() == "x" * 1_000_000
        with pytest.raises(ConnectionClosedError) as closed:
            await client.send("x" * 1_000_001)
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009
    assert REGISTRY.get_sample_value("rowcast_closed_total", {"code": "1009"}) == before + 1


async def test_more_frames_than_allowed_in_a_tick_close_with_4429() -> None:
    async with serving(frames=100) as server:
        peer, _ = await server.open()
        await peer.send(100 * frame(Opcode.PING))
        for _ in range(100):
            assert await peer.read_frame() == (Opcode.PONG, b"")
        server.pass_time(1)
        await peer.send(101 * frame(Opcode.PING))
        assert await peer.read_close() == 4429


async def test_close_sends_its_code_once_and_after_everything_written() -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        recorder.socket.write(encode(b"before"))
        recorder.socket.close(4401, "token")
        recorder.socket.close(1000, "again")
        recorder.socket.write(encode(b"after"))
        assert await peer.read_frame() == (Opcode.TEXT, b"before")
        assert await peer.read_frame() == (Opcode.CLOSE, (4401).to_bytes(2, "big") + b"token")
        await peer.send_frame(Opcode.TEXT, b"too late")
        await peer.send_frame(Opcode.CLOSE, (4401).to_bytes(2, "big"))
        assert await peer.read_all() == b""
        peer.close()
        await recorder.lost.wait()
        assert recorder.texts == []


async def test_a_reason_that_is_too_long_for_a_close_frame_is_cut_between_characters() -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        recorder.socket.close(4400, "ü" * 100)
        assert await peer.read_frame() == (Opcode.CLOSE, (4400).to_bytes(2, "big") + 61 * "ü".encode())


async def test_a_peer_that_does_not_answer_a_close_is_cut() -> None:
    async with serving(close_timeout=2.0) as server:
        peer, recorder = await server.open()
        recorder.socket.close(1012, "restart")
        server.pass_time(1)
        assert recorder.losses == 0
        server.pass_time(1)
        await recorder.lost.wait()
        assert server.gateway.aborted == {"close_timeout": 1}
        assert await peer.read_close() == 1012


async def test_a_peer_that_keeps_its_side_open_after_a_violation_is_cut() -> None:
    async with serving(close_timeout=2.0) as server:
        peer, recorder = await server.open()
        await peer.send_frame(Opcode.BINARY, b"")
        assert await peer.read_close() == 1003
        server.pass_time(2)
        await recorder.lost.wait()
        assert server.gateway.aborted == {"close_timeout": 1}


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("close frame", None),
        ("half-close", None),
        ("close", None),
        ("reset", None),
        ("broken frame", 1002),
        ("our close", 1012),
        ("our close, unanswered", 1012),
        ("our abort", 4408),
    ],
)
async def test_a_handler_learns_once_that_its_client_is_lost_and_why_if_we_ended_it(
    ending: str, code: int | None
) -> None:
    async with serving() as server:
        peer, recorder = await server.open()
        match ending:
            case "close frame":
                await peer.send_frame(Opcode.CLOSE, b"\x03\xe8")
                await peer.read_close()
                peer.close()
            case "half-close":
                peer.half_close()
            case "close":
                peer.close()
            case "reset":
                peer.reset()
            case "broken frame":
                await peer.send(b"\xff\xff")
                assert await peer.read_close() == 1002
                peer.close()
            case "our close, unanswered":
                recorder.socket.close(1012, "restart")
                server.pass_time(2)
            case "our close":
                recorder.socket.close(1012, "restart")
                await peer.read_close()
                await peer.send_frame(Opcode.CLOSE, b"\x03\xf4")
                await peer.read_all()
                peer.close()
            case "our abort":
                recorder.socket.write(bytes(32 * 2**20))
                server.pass_time(30)
        await recorder.lost.wait()
        await until(lambda: server.gateway.sockets == 0)
        recorder.socket.write(encode(b"to nobody"))
        recorder.socket.close(1000, "nobody")
        await recorder.socket.drained()
        server.pass_time(60)
        assert recorder.losses == 1
        assert server.gateway.connections == 0
        assert code == (recorder.close and recorder.close.code)


async def test_a_handler_that_raises_closes_only_its_own_client_with_1011() -> None:
    def fail(recorder: Recorder, text: bytes) -> None:
        if text == b"provoke":
            raise RuntimeError("a bug")
        recorder.socket.write(encode(text))

    async with serving(answer=fail) as server, server.connect() as bystander:
        await server.handlers.get()
        peer, recorder = await server.open()
        await peer.send_frame(Opcode.TEXT, b"provoke")
        assert await peer.read_close() == 1011
        peer.close()
        await recorder.lost.wait()
        await bystander.send("undisturbed")
        assert await bystander.recv() == "undisturbed"


async def test_every_tick_reaches_every_open_client() -> None:
    async with serving(answer=silence) as server:
        _, first = await server.open()
        _, second = await server.open()
        start = server.clock.now
        server.pass_time(2)
        second.socket.close(1012, "restart")
        server.pass_time(1)
        assert first.ticks == [start + 1, start + 2, start + 3]
        assert second.ticks == [start + 1, start + 2]


async def test_the_gateway_ticks_by_itself() -> None:
    async with serving(tick_every=0.01) as server:
        _, recorder = await server.open()
        await until(lambda: len(recorder.ticks) > 2)


async def test_the_ticks_of_many_clients_are_spread_over_the_time_until_the_next() -> None:
    ticked: list[tuple[Recorder, float]] = []
    async with serving(tick_every=3600) as server:
        loop = asyncio.get_running_loop()
        opened = [await server.open() for _ in range(2 * TICK_BATCH + 5)]
        for _, recorder in opened:
            recorder.tick = lambda _, recorder=recorder: ticked.append((recorder, loop.time()))  # type: ignore[misc, method-assign]
        due: list[float] = []

        def call_later(delay: float, callback: Callable[..., object], *arguments: object) -> asyncio.Handle:
            if getattr(callback, "__name__", "") != "_tick_peers":  # what else shares this loop
                return at(delay, callback, *arguments)
            due.append(delay)
            return loop.call_soon(callback, *arguments)

        at = loop.call_later
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "call_later", call_later)
            server.gateway.housekeep()
            assert TICK_BATCH == len(ticked)
            while len(ticked) < len(opened):
                await asyncio.sleep(0)
    assert [1200, 1200] == due
    assert len({id(recorder) for recorder, _ in ticked}) == len(opened)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_a_frame_is_the_same_as_the_librarys(size: int) -> None:
    payload = b"x" * size
    assert Frame(Opcode.TEXT, payload).serialize(mask=False) == encode(payload)
