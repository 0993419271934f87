import asyncio

import pytest
from ulid import ULID
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Frame, Opcode

from daemon.gateway.server import TICK_BATCH, encode
from tests.gateway.peers import Recorder, frame, serving, silence, until


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 1_000_000])
def test_encode_makes_one_final_unmasked_text_frame(size: int) -> None:
    payload = b"x" * size
    encoded = encode(payload)
    assert encoded == Frame(Opcode.TEXT, payload).serialize(mask=False)
    assert encoded[0] == 0x81
    assert encoded.endswith(payload)


async def test_a_message_reaches_the_attendant_and_its_answer_comes_back() -> None:
    async with serving() as served, served.connect() as client:
        await client.send("grüß dich")
        assert await client.recv() == "grüß dich"
        recorder = await served.attendants.get()
        assert recorder.texts == ["grüß dich".encode()]


async def test_every_connection_has_a_ulid_of_its_own() -> None:
    async with serving() as served, served.connect(), served.connect():
        first = (await served.attendants.get()).socket.session
        second = (await served.attendants.get()).socket.session
        assert first != second
        assert str(ULID.from_str(first)) == first


async def test_many_frames_of_one_write_arrive_in_order() -> None:
    async with serving() as served, served.connect() as client:
        recorder = await served.attendants.get()
        recorder.socket.write(b"".join(encode(b"%d" % number) for number in range(1000)))
        assert [await client.recv() for _ in range(1000)] == [str(number) for number in range(1000)]


async def test_a_message_of_a_megabyte_arrives_whole() -> None:
    async with serving() as served, served.connect(max_size=None) as client:
        recorder = await served.attendants.get()
        recorder.socket.write(encode(b"m" * 2**20))
        assert await client.recv() == "m" * 2**20


async def test_fragments_are_joined_and_a_ping_between_them_is_answered() -> None:
    async with serving() as served:
        peer, recorder = await served.open()
        whole = "ein Stück für dich".encode()
        await peer.send_frame(Opcode.TEXT, whole[:7], fin=False)
        await peer.send_frame(Opcode.PING, b"there?")
        await peer.send_frame(Opcode.CONT, whole[7:8], fin=False)  # the cut goes through the ü
        await peer.send_frame(Opcode.CONT, whole[8:])
        assert await peer.read_frame() == (Opcode.PONG, b"there?")
        assert await peer.read_frame() == (Opcode.TEXT, whole)
        assert recorder.texts == [whole]


async def test_a_frame_may_come_byte_by_byte() -> None:
    async with serving() as served:
        peer, _ = await served.open()
        for byte in frame(Opcode.TEXT, b"slow"):
            await peer.send(bytes([byte]))
        assert await peer.read_frame() == (Opcode.TEXT, b"slow")


async def test_the_largest_message_that_is_allowed_comes_in() -> None:
    async with serving() as served, served.connect() as client:
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
    "a close code that is none": (frame(Opcode.CLOSE, (999).to_bytes(2, "big")), 1002),
    "a binary message": (frame(Opcode.BINARY, b"\0\1"), 1003),
    "a binary fragment": (frame(Opcode.BINARY, b"\0\1", fin=False), 1003),
    "text that is not UTF-8": (frame(Opcode.TEXT, b"caf\xe9"), 1007),
    "a surrogate": (frame(Opcode.TEXT, b"\xed\xa0\x80"), 1007),
    "half a character at the end": (frame(Opcode.TEXT, b"\xc3", fin=False) + frame(Opcode.CONT, b""), 1007),
    "a close reason that is not UTF-8": (frame(Opcode.CLOSE, b"\x03\xe8\xff"), 1007),
    "one byte too many": (frame(Opcode.TEXT, b"x" * 65537), 1009),
    "two megabytes": (frame(Opcode.TEXT, b"x" * 2_000_000), 1009),
    "a length of 2^62": (masked(0x81, 0xFF, (2**62).to_bytes(8, "big") + bytes(4)), 1009),
    "too much in two pieces": (
        frame(Opcode.TEXT, b"x" * 65536, fin=False) + frame(Opcode.CONT, b"x"),
        1009,
    ),
    "too many pieces": (
        frame(Opcode.TEXT, b"", fin=False) + 200 * frame(Opcode.CONT, b"", fin=False),
        1009,
    ),
}


@pytest.mark.parametrize(("sent", "code"), VIOLATIONS.values(), ids=VIOLATIONS.keys())
async def test_a_violation_closes_with_its_code_and_disturbs_nobody(sent: bytes, code: int) -> None:
    async with serving() as served, served.connect() as bystander:
        await served.attendants.get()
        peer, recorder = await served.open()
        await peer.send(sent)
        assert await peer.read_close() == code
        assert await peer.read_all() == b""
        peer.close()
        await recorder.gone.wait()
        assert recorder.texts == []
        assert recorder.losses == 1
        await bystander.send("undisturbed")
        assert await bystander.recv() == "undisturbed"


async def test_what_came_before_a_violation_is_answered_before_the_close() -> None:
    async with serving() as served:
        peer, _ = await served.open()
        await peer.send(frame(Opcode.TEXT, b"good") + frame(Opcode.BINARY, b"bad") + frame(Opcode.TEXT, b"late"))
        assert await peer.read_frame() == (Opcode.TEXT, b"good")
        assert await peer.read_close() == 1003
        assert await peer.read_all() == b""


async def test_the_answer_to_what_came_with_a_close_frame_goes_out_before_the_close() -> None:
    async with serving() as served:
        peer, recorder = await served.open()
        await peer.send(frame(Opcode.TEXT, b"last words") + frame(Opcode.CLOSE, b"\x03\xe8"))
        assert await peer.read_frame() == (Opcode.TEXT, b"last words")
        assert await peer.read_close() == 1000
        peer.close()
        await recorder.gone.wait()


async def test_a_library_client_that_sends_too_much_learns_1009() -> None:
    async with serving() as served, served.connect() as client:
        with pytest.raises(ConnectionClosedError) as closed:
            await client.send("x" * 2_000_000)
            await client.recv()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


async def test_more_frames_than_allowed_in_a_tick_close_with_4429() -> None:
    async with serving(frames=100) as served:
        peer, _ = await served.open()
        await peer.send(100 * frame(Opcode.PING))
        for _ in range(100):
            assert await peer.read_frame() == (Opcode.PONG, b"")
        served.pass_time(1)
        await peer.send(101 * frame(Opcode.PING))
        assert await peer.read_close() == 4429


async def test_close_sends_its_code_behind_what_was_written_and_only_once() -> None:
    async with serving() as served:
        peer, recorder = await served.open()
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
        await recorder.gone.wait()
        assert recorder.texts == []


async def test_a_reason_that_is_too_long_for_a_close_frame_is_cut_between_characters() -> None:
    async with serving() as served:
        peer, recorder = await served.open()
        recorder.socket.close(4400, "ü" * 100)
        assert await peer.read_frame() == (Opcode.CLOSE, (4400).to_bytes(2, "big") + 61 * "ü".encode())


async def test_a_peer_that_does_not_answer_a_close_is_cut() -> None:
    async with serving(close_timeout=2.0) as served:
        peer, recorder = await served.open()
        recorder.socket.close(1012, "restart")
        served.pass_time(1)
        assert recorder.losses == 0
        served.pass_time(1)
        await recorder.gone.wait()
        assert served.gateway.aborted == {"close_timeout": 1}
        assert await peer.read_close() == 1012


async def test_a_peer_that_keeps_its_side_open_after_a_violation_is_cut() -> None:
    async with serving(close_timeout=2.0) as served:
        peer, recorder = await served.open()
        await peer.send_frame(Opcode.BINARY, b"")
        assert await peer.read_close() == 1003
        served.pass_time(2)
        await recorder.gone.wait()
        assert served.gateway.aborted == {"close_timeout": 1}


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("close frame", None),
        ("half-close", None),
        ("close", None),
        ("reset", None),
        ("broken frame", 1002),
        ("our close", 1012),
        ("our close, unheard", 1012),
        ("our cut", 4408),
    ],
)
async def test_an_attendant_learns_once_that_its_client_is_lost_and_why_if_we_ended_it(
    ending: str, code: int | None
) -> None:
    async with serving() as served:
        peer, recorder = await served.open()
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
            case "our close, unheard":
                recorder.socket.close(1012, "restart")
                served.pass_time(2)
            case "our close":
                recorder.socket.close(1012, "restart")
                await peer.read_close()
                await peer.send_frame(Opcode.CLOSE, b"\x03\xf4")
                await peer.read_all()
                peer.close()
            case "our cut":
                recorder.socket.write(bytes(32 * 2**20))
                served.pass_time(30)
        await recorder.gone.wait()
        await until(lambda: served.gateway.sockets == 0)
        recorder.socket.write(encode(b"to nobody"))
        recorder.socket.close(1000, "nobody")
        await recorder.socket.drained()
        served.pass_time(60)
        assert recorder.losses == 1
        assert served.gateway.connections == 0
        assert code == (recorder.close and recorder.close.code)


async def test_an_attendant_that_fails_costs_its_own_client_1011_and_no_other() -> None:
    def fail(recorder: Recorder, text: bytes) -> None:
        if text == b"provoke":
            raise RuntimeError("a bug")
        recorder.socket.write(encode(text))

    async with serving(answer=fail) as served, served.connect() as bystander:
        await served.attendants.get()
        peer, recorder = await served.open()
        await peer.send_frame(Opcode.TEXT, b"provoke")
        assert await peer.read_close() == 1011
        peer.close()
        await recorder.gone.wait()
        await bystander.send("undisturbed")
        assert await bystander.recv() == "undisturbed"


async def test_every_open_client_is_told_the_time_at_every_tick() -> None:
    async with serving(answer=silence) as served:
        _, first = await served.open()
        _, second = await served.open()
        start = served.clock.now
        served.pass_time(2)
        second.socket.close(1012, "restart")
        served.pass_time(1)
        assert first.ticks == [start + 1, start + 2, start + 3]
        assert second.ticks == [start + 1, start + 2]


async def test_the_gateway_ticks_by_itself() -> None:
    async with serving(tick_every=0.01) as served:
        _, recorder = await served.open()
        await until(lambda: len(recorder.ticks) > 2)


async def test_who_has_something_to_say_is_heard_before_everybody_has_been_told_the_time() -> None:
    async with serving() as served:
        opened = [await served.open() for _ in range(TICK_BATCH + 44)]
        told: list[Recorder] = []
        for _, recorder in opened:
            recorder.tick = lambda _, recorder=recorder: told.append(recorder)  # type: ignore[misc, method-assign]
        heard: list[int] = []
        asyncio.get_running_loop().call_soon(lambda: heard.append(len(told)))
        served.gateway.housekeep()
        await until(lambda: len(told) == TICK_BATCH + 44)
    assert [TICK_BATCH] == heard
    assert len(set(map(id, told))) == TICK_BATCH + 44


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65_535, 65_536, 70_000])
def test_a_frame_is_the_same_as_the_librarys(size: int) -> None:
    payload = b"x" * size
    assert Frame(Opcode.TEXT, payload).serialize(mask=False) == encode(payload)
