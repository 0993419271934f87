"""Frames that many clients get: straight to the kernel where that is allowed, and in order with everything else."""

from daemon.gateway.fan_out import fan_out
from daemon.gateway.server import encode
from tests.gateway.peers import SMALL, Follower, RawPeer, Server, fill, serving, silence, until


async def following(server: Server, receive_buffer: int | None = None) -> tuple[RawPeer, Follower]:
    peer, recorder = await server.open(receive_buffer)
    return peer, Follower(recorder)


async def texts(peer: RawPeer, count: int) -> list[bytes]:
    return [(await peer.read_frame())[1] for _ in range(count)]


def number(count: int) -> bytes:
    return encode(b"%d" % count)


async def test_frames_go_straight_to_everyone_who_has_nothing_queued() -> None:
    async with serving() as server:
        pairs = [await following(server) for _ in range(3)]
        followers = [follower for _, follower in pairs]
        fan_out(followers, number(1))
        fan_out(followers, number(2) + number(3))
        assert [[b"1", b"2", b"3"]] * 3 == [await texts(peer, 3) for peer, _ in pairs]
        assert [0, 0, 0] == [follower.calls for follower in followers]
        before = [info.sent for info in server.gateway.sessions(10)]
        fan_out(followers, number(4))
        assert [sent + len(number(4)) for sent in before] == [info.sent for info in server.gateway.sessions(10)]


async def test_a_peer_that_does_not_read_gets_everything_in_order_once_it_does() -> None:
    async with serving() as server:
        slow, follower = await following(server, SMALL)
        other, undisturbed = await following(server)
        frames = [encode(b"%d" % count + b"x" * 60_000) for count in range(200)]
        for count, frame in enumerate(frames):
            fan_out([follower, undisturbed], frame)
            assert (await other.read_frame())[1].startswith(b"%dx" % count)
        assert follower.socket.queued() > 2**20
        assert follower.calls > 100, "whoever has something queued is asked whether it is too much"
        assert [len(frame) for frame in frames] == [len(encode(text)) for text in await texts(slow, len(frames))]
        await until(lambda: not follower.socket.queued())
        before = follower.calls
        fan_out([follower], number(1))
        assert [b"1"] == await texts(slow, 1)
        assert before == follower.calls
        assert 0 == undisturbed.calls


async def test_what_is_written_otherwise_keeps_its_place_among_these_frames() -> None:
    async with serving() as server:
        peer, follower = await following(server, SMALL)
        for count in range(2000):
            frame = encode(b"%d " % count * 2000)
            if count % 3:
                fan_out([follower], frame)
            else:
                follower.socket.write(frame)
        assert follower.socket.queued()
        assert [b"%d" % count for count in range(2000)] == [text.split()[0] for text in await texts(peer, 2000)]


async def test_room_in_the_kernel_is_for_what_is_queued_already() -> None:
    async with serving() as server:
        peer, recorder = await server.open(SMALL)
        follower = Follower(recorder)
        fill(recorder)
        peer.read_at_once()  # and the event loop does not run, so what is queued stays queued
        fan_out([follower], number(1))
        *others, last = await texts(peer, 251)
        assert ({b"x" * 65_000}, b"1") == (set(others), last)


async def test_nothing_follows_a_close_frame() -> None:
    async with serving() as server:
        peer, follower = await following(server)
        fan_out([follower], number(1))
        follower.socket.close(1012, "restart")
        fan_out([follower], number(2))
        assert [b"1"] == await texts(peer, 1)
        assert 1012 == await peer.read_close()
        server.pass_time(1)
        assert b"" == await peer.read_all()


async def test_the_file_descriptor_of_a_connection_that_has_ended_is_not_written_to() -> None:
    async with serving() as server:
        peer, follower = await following(server)
        peer.reset()
        await until(lambda: server.gateway.connections == 0)
        other, successor = await following(server)  # it may have the same file descriptor
        fan_out([follower, successor], number(1))
        fan_out([follower], number(2))
        fan_out([successor], number(3))
        assert [b"1", b"3"] == await texts(other, 2)


async def test_a_peer_that_has_gone_disturbs_nobody() -> None:
    async with serving() as server:
        gone, first = await following(server)
        peer, second = await following(server)
        gone.reset()
        for count in range(5):  # the kernel tells at one of the writes
            fan_out([first, second], number(count))
        assert [b"%d" % count for count in range(5)] == await texts(peer, 5)
        await until(lambda: server.gateway.connections == 1)


async def test_frames_for_a_peer_that_takes_compressed_ones_do_not_go_straight() -> None:
    async with (
        serving(answer=silence, deflate_bytes=1000) as server,
        server.connect(compression="deflate") as compressed,
        server.connect(compression=None) as plain,
    ):
        followers = [Follower(await server.handlers.get()) for _ in range(2)]
        fan_out(followers, encode(b"x" * 5000))
        assert ["x" * 5000] * 2 == [await client.recv() for client in (compressed, plain)]
        assert [1, 0] == [follower.calls for follower in followers]
