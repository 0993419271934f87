"""Limits on connections: which are refused, which give way, and how a user who sends too much is held up."""

import asyncio
import resource
import time
from functools import partial
from itertools import pairwise

import pytest
from websockets.frames import Opcode

from daemon.core.errors import Overloaded, TooManyConnections
from daemon.gateway.admission import Accounts, Crowd, Strangers, address_group
from daemon.gateway.connection import FRAMES_PER_TURN, SLICE, TURN
from daemon.gateway.http import text_page
from daemon.gateway.limits import RESERVED, Limits
from daemon.metrics import REGISTRY
from tests.gateway.peers import UPGRADE, RawPeer, Recorder, Server, echo, frame, request, serving, silence, until

# Who gives way.


def test_the_oldest_of_the_address_with_the_most_connections_gives_way() -> None:
    crowd = Crowd[str](4, grace=0.0)
    for now, (name, address) in enumerate([("a1", "a"), ("b1", "b"), ("b2", "b"), ("c1", "c")]):
        assert crowd.add(name, address, now) is None
    assert "b1" == crowd.add("d1", "d", 4)
    assert "a1" == crowd.add("d2", "d", 5)  # of several with the same number, the one that came first
    assert "d1" == crowd.add("d3", "d", 6)
    assert 4 == len(crowd)


def test_an_address_that_comes_again_and_again_only_pushes_out_its_own() -> None:
    crowd = Crowd[int](10, grace=0.0)
    crowd.add(-1, "patient", 0)
    evicted = [crowd.add(number, "busy", number) for number in range(1000)]
    assert -1 not in evicted
    assert [None] * 9 + list(range(991)) == evicted


def test_nobody_gives_way_within_the_grace_period() -> None:
    crowd = Crowd[str](1, grace=0.5)
    assert crowd.delay(10) == 0
    crowd.add("a", "a", 10.0)
    assert 0.5 == crowd.delay(10.0)
    assert crowd.delay(10.5) <= 0
    crowd.discard("a", "a")
    crowd.discard("a", "a")
    assert (0, 0) == (crowd.delay(10.0), len(crowd))


@pytest.mark.parametrize(
    ("host", "group"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
    ],
)
def test_the_addresses_that_one_peer_can_choose_from_count_as_one(host: str, group: str) -> None:
    assert group == address_group(host)


# How many there may be.


@pytest.mark.parametrize("allowed", [RESERVED + 8, 256, 1024, 65_536, resource.RLIM_INFINITY])
def test_connections_of_every_kind_fit_into_the_open_files_limit(
    allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (allowed, allowed))
    limits = Limits()
    assert limits.max_clients() >= 1
    assert 1 <= limits.max_pending() <= limits.max_clients()
    if allowed != resource.RLIM_INFINITY:
        assert limits.max_clients() + limits.max_pending() <= allowed - RESERVED
    assert (10_000, 2_048) == (limits.connections, limits.pending)


def test_a_user_has_at_most_a_quarter_of_all_places_by_default() -> None:
    accounts = Accounts(Limits(connections=8))
    held = [accounts.enter("ada"), accounts.enter("ada")]
    with pytest.raises(TooManyConnections):
        accounts.enter("ada")
    others = [accounts.enter(name) for name in "abcdef"]
    assert accounts.full
    with pytest.raises(Overloaded):
        accounts.enter("g")
    accounts.leave(held[0])
    assert accounts.enter("ada").connections == 2
    assert 8 == accounts.connections == len(held) + len(others)


def test_a_user_who_leaves_and_returns_has_no_new_rate() -> None:
    accounts = Accounts(Limits(user_rate=10, user_burst=1.0))
    account = accounts.enter("ada")
    assert accounts.delay(account, now=100.0) <= 0
    accounts.charge(account, 30, now=100.0)
    assert 2.0 == accounts.delay(account, now=100.0)
    accounts.leave(account)
    accounts.forget(now=101.0)
    account = accounts.enter("ada")
    assert 1.0 == accounts.delay(account, now=101.0)
    accounts.leave(account)
    accounts.forget(now=103.0)
    assert accounts.delay(accounts.enter("ada"), now=103.0) <= 0


def test_replays_on_credit_delay_no_frame_and_end_with_it_or_with_half_of_what_may_be_used_at_once() -> None:
    accounts = Accounts(Limits(user_cpu=0.1, user_burst=1.0, user_credit=100.0))
    account = accounts.enter("ada")
    accounts.lend(account, 9.9, now=100.0)
    assert accounts.has_credit(account, now=100.0)
    accounts.lend(account, 0.2, now=100.0)
    assert accounts.delay(account, now=100.0) <= 0
    assert not accounts.has_credit(account, now=100.0)
    accounts.leave(account)
    accounts.forget(now=100.0)
    account = accounts.enter("ada")
    assert [False, True] == [accounts.has_credit(account, now) for now in (100.5, 101.5)]
    accounts.charge(account, 0, now=300.0, spent=0.06)
    assert [False, True] == [accounts.has_credit(account, now) for now in (300.0, 300.2)]
    accounts.charge(account, 1500, now=400.0)
    assert accounts.has_credit(account, now=400.0)


async def test_a_newcomer_takes_the_place_of_the_oldest_connection_without_a_request() -> None:
    async with serving({"/healthz": lambda: text_page("ok")}, pending=3, grace=0.0) as server:
        idle = []
        for number in range(3):
            idle.append(await server.raw())
            await until(lambda: server.gateway.pending == number + 1)  # noqa: B023
        peer = await server.raw()
        await peer.send(request("GET /healthz"))
        assert (await peer.read_all()).endswith(b"ok\n")
        assert (await idle[0].read_all()).startswith(b"HTTP/1.1 503 ")
        assert 3 == server.gateway.pending


async def test_a_websocket_without_a_hello_gives_way_with_1013() -> None:
    async with serving(user="", pending=1, grace=0.0) as server:
        first, recorder = await server.open()
        await server.open()
        assert 1013 == await first.read_close()
        await recorder.lost.wait()
        assert recorder.close == (1013, "overload")
        assert (0, 1) == (server.gateway.clients, server.gateway.pending)


async def test_a_newcomer_waits_while_all_others_are_in_their_grace_period() -> None:
    async with serving(pending=1, grace=1.0) as server:
        await server.raw()
        await until(lambda: server.gateway.sockets == 1)
        waiting = await server.raw()
        await waiting.send(request("GET /nowhere"))
        server.pass_time(0)
        assert 1 == server.gateway.sockets
        server.pass_time(1)
        assert (await waiting.read_all()).startswith(b"HTTP/1.1 404 ")


async def test_an_authenticated_client_gives_way_to_nobody() -> None:
    async with serving(pending=1, grace=0.0) as server, server.connect() as client:
        for _ in range(5):
            await server.raw()
        await client.send("still here")
        assert await client.recv() == "still here"


async def test_connections_of_the_admin_listener_have_places_of_their_own() -> None:
    async with serving({"/metrics": lambda: text_page("ok")}, pending=1, grace=3600.0) as server:
        await server.raw()  # the only place, for an hour
        await until(lambda: server.gateway.sockets == 1)
        server.port = server.admin_port
        for _ in range(3):
            peer = await server.raw()
            await peer.send(request("GET /metrics"))
            assert (await peer.read_all()).endswith(b"ok\n")
        assert 1 == server.gateway.pending


async def test_an_address_with_too_many_connections_gets_429_if_that_is_limited() -> None:
    async with serving(per_address=2) as server:
        first, _ = await server.open()
        await server.raw()
        await until(lambda: server.gateway.sockets == 2)
        third = await server.raw()
        answer = await third.read_all()
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"\r\nRetry-After: " in answer
        first.close()
        await until(lambda: server.gateway.sockets == 1)
        await server.open()


# What those take who are not authenticated.


def test_strangers_share_an_allowance_that_returns_with_time() -> None:
    strangers = Strangers(Limits(pending_cpu=0.1, pending_burst=0.5))
    assert strangers.delay(now=100.0) <= 0
    strangers.charge(0.1, now=100.0)
    assert 0.5 == pytest.approx(strangers.delay(now=100.0))
    assert 0 == pytest.approx(strangers.delay(now=100.5))
    strangers.charge(-0.05, now=100.0)  # one of them was somebody
    assert 0 == pytest.approx(strangers.delay(now=100.0))
    strangers.use(Limits(pending_cpu=0.1, pending_burst=0.0))
    assert 0.5 == pytest.approx(strangers.delay(now=100.0))


def held_up() -> float:
    return REGISTRY.get_sample_value("rowcast_held_up_total") or 0.0


async def test_newcomers_wait_while_strangers_have_used_up_their_share() -> None:
    pages = {"/healthz": lambda: text_page("ok")}
    async with serving(pages, answer=echo, pending_cpu=0.001, pending_burst=0.0) as server:
        client, recorder = await server.open()  # who is authenticated gives back what that took
        other, _ = await server.open()
        before = held_up()
        stranger = await server.raw()
        await stranger.send(request("GET /healthz"))
        assert (await stranger.read_all()).endswith(b"ok\n")
        newcomer = await server.raw()
        await newcomer.send(request("GET /healthz"))
        await until(lambda: held_up() > before)
        await client.send_frame(Opcode.TEXT, b"as ever")
        assert (Opcode.TEXT, b"as ever") == await client.read_frame()
        server.port = server.admin_port
        admin = await server.raw()
        await admin.send(request("GET /healthz"))
        assert (await admin.read_all()).endswith(b"ok\n")
        assert b"" == newcomer.buffer
        assert (await newcomer.read_all()).endswith(b"ok\n")
        assert [b"as ever"] == recorder.texts
        other.close()


async def test_newcomers_are_let_in_as_soon_as_those_before_them_are_authenticated() -> None:
    def answer(recorder: Recorder, _: bytes) -> None:
        recorder.socket.authenticated("ada")

    async with serving(user="", answer=answer, pending_cpu=1e-7, pending_burst=0.0) as server:
        before = held_up()
        first, _ = await server.open()  # which counts for an hour
        newcomer = await server.raw()
        await newcomer.send(request("GET /v1", UPGRADE))
        await until(lambda: held_up() > before)
        await first.send(frame(Opcode.TEXT, b"hello"))
        assert (await newcomer.read_head()).startswith(b"HTTP/1.1 101 ")


async def test_a_user_who_has_used_up_the_share_counts_as_a_stranger() -> None:
    async with serving(answer=silence, pending_cpu=0.001, pending_burst=0.1) as server:
        for _ in range(3):
            await server.open()
        before = held_up()
        _, recorder = await server.open()
        recorder.socket.spend(3600)
        assert recorder.socket.delay() > 3600
        await server.open()
        waiting = await server.raw()
        await until(lambda: held_up() > before)
        waiting.close()


# What they may send.


async def count_turns(server: Server, peer: RawPeer, recorder: Recorder, sent: bytes, expected: int) -> int:
    """The number of iterations of the event loop in which the messages were processed."""
    turns = 0
    size = 0
    await peer.send(sent)
    while size < expected:
        await asyncio.sleep(0)
        turns += len(recorder.texts) > size
        size = len(recorder.texts)
    return turns


async def test_others_have_their_turn_between_the_frames_of_one_connection() -> None:
    async with serving(answer=silence) as server:
        peer, recorder = await server.open()
        sent = 30 * FRAMES_PER_TURN
        turns = await count_turns(server, peer, recorder, sent * frame(Opcode.TEXT, b"x"), sent)
        assert turns >= sent / FRAMES_PER_TURN
        assert [b"x"] * sent == recorder.texts


@pytest.mark.parametrize("first", [b"", frame(Opcode.TEXT, b"x" * 30_000)], ids=["alone", "behind a large frame"])
async def test_others_have_their_turn_between_few_of_many_pings(first: bytes) -> None:
    ping, pong, count = frame(Opcode.PING, b""), 2, 3000
    async with serving(answer=silence, user_rate=1_000_000, user_cpu=1.0) as server:
        peer, recorder = await server.open()
        outlet, most = recorder.socket.outlet, 0
        assert outlet is not None
        written, end = outlet.written, outlet.written + count * pong
        await peer.send(first + count * ping)
        while written < end:
            await asyncio.sleep(0)
            most = max(most, outlet.written - written)
            written = outlet.written
        assert most <= (SLICE // len(ping) + 1) * pong


async def test_frames_that_arrived_before_a_close_are_processed_in_order() -> None:
    async with serving(answer=silence) as server:
        peer, recorder = await server.open()
        many = [b"%d" % number for number in range(3 * FRAMES_PER_TURN)]
        await peer.send(b"".join(frame(Opcode.TEXT, text) for text in many) + frame(Opcode.CLOSE, b"\x03\xe8"))
        assert 1000 == await peer.read_close()
        peer.close()
        await recorder.lost.wait()
        assert many == recorder.texts


async def test_a_user_who_exceeds_the_rate_waits_and_loses_nothing() -> None:
    async with serving(answer=silence, user_rate=1000, user_burst=0.05) as server:
        one, first = await server.open()
        other, second = await server.open()
        loop = asyncio.get_running_loop()
        began = loop.time()
        for peer in (one, other):
            await peer.send(150 * frame(Opcode.TEXT, b"x"))
        await until(lambda: len(first.texts) == len(second.texts) == 150)
        # 300 frames, less the burst and one turn of each connection, which is counted after it.
        assert loop.time() - began >= (300 - 50 - 2 * FRAMES_PER_TURN) / 1000


async def test_a_large_frame_counts_as_several() -> None:
    async with serving(answer=silence, user_rate=1000, user_burst=0.05) as server:
        peer, recorder = await server.open()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await peer.send(5 * frame(Opcode.TEXT, b"x" * 60_000))
        await until(lambda: len(recorder.texts) == 5)
        assert loop.time() - began >= (4 * 58 - 50) / 1000


def spend(seconds: float) -> None:
    """Use the processor."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


async def test_a_user_who_sends_what_takes_long_waits_sooner() -> None:
    async with serving(answer=lambda *_: spend(0.002), user_cpu=0.1, user_burst=0.0) as server:
        peer, recorder = await server.open()
        loop = asyncio.get_running_loop()
        began = loop.time()
        await peer.send(10 * frame(Opcode.TEXT, b"x"))
        await until(lambda: len(recorder.texts) == 10)
        assert loop.time() - began >= 9 * 0.002 / 0.1


async def test_a_turn_ends_early_if_its_frames_take_long() -> None:
    async with serving(answer=lambda *_: spend(TURN), user_cpu=1.0) as server:
        peer, recorder = await server.open()
        sent = FRAMES_PER_TURN // 2
        assert sent == await count_turns(server, peer, recorder, sent * frame(Opcode.TEXT, b"x"), sent)


async def test_those_who_wait_for_a_users_share_have_their_turns_in_order() -> None:
    accounts = Accounts(Limits(user_rate=1000, user_burst=0.0))
    account, loop = accounts.enter("ada"), asyncio.get_running_loop()
    had: list[tuple[str, float]] = []

    def take(name: str) -> None:
        had.append((name, loop.time()))
        accounts.charge(account, 20, loop.time())

    take("first")
    turns = [accounts.wait(account, partial(take, name)) for name in ("second", "cancelled", "third")]
    turns[1].cancel()
    await until(lambda: len(had) == 3)
    assert ["first", "second", "third"] == [name for name, _ in had]
    assert all(later - at >= 0.02 for (_, at), (_, later) in pairwise(had))
    assert account.timer is None


async def test_a_client_whose_frames_wait_is_not_cut_as_silent() -> None:
    async with serving(answer=silence, user_rate=1, user_burst=0.0) as server:
        peer, recorder = await server.open()
        await peer.send(frame(Opcode.TEXT, b"x"))
        await until(lambda: recorder.texts == [b"x"])
        recorder.socket.charge(3600)
        before = REGISTRY.get_sample_value("rowcast_throttled_total")
        await peer.send(frame(Opcode.TEXT, b"y"))
        await until(lambda: REGISTRY.get_sample_value("rowcast_throttled_total") != before)
        server.pass_time(20)
        assert await peer.read_frame() == (Opcode.PING, b"")
        server.pass_time(60)
        assert {} == server.gateway.aborted
        assert [b"x"] == recorder.texts
        peer.reset()


@pytest.mark.parametrize("passes", ["a turn", "a tick"])
async def test_a_client_that_resets_while_its_frames_wait_is_gone_and_none_is_processed(passes: str) -> None:
    async with serving(answer=silence) as server:
        stays, recorder = await server.open()
        opened = [await server.open() for _ in range(3)]
        recorder.socket.spend(0.2 if passes == "a turn" else 3600)
        before = REGISTRY.get_sample_value("rowcast_throttled_total") or 0
        for peer, _ in opened:
            await peer.send(frame(Opcode.TEXT, b"x"))
        await until(lambda: REGISTRY.get_sample_value("rowcast_throttled_total") == before + 3)
        assert 4 == server.gateway.clients
        for peer, _ in opened:
            peer.reset()
        if passes == "a tick":
            server.pass_time(1)
        await until(lambda: server.gateway.clients == 1)
        assert [[], [], []] == [recorder.texts for _, recorder in opened]
        assert {} == server.gateway.aborted
        stays.close()


async def test_what_a_client_sent_before_it_closed_is_processed_in_its_turn() -> None:
    async with serving(answer=silence) as server:
        peer, recorder = await server.open()
        recorder.socket.spend(0.2)
        before = REGISTRY.get_sample_value("rowcast_throttled_total") or 0
        await peer.send(frame(Opcode.TEXT, b"last"))
        await until(lambda: REGISTRY.get_sample_value("rowcast_throttled_total") == before + 1)
        peer.close()
        await until(lambda: server.gateway.clients == 0)
        assert [b"last"] == recorder.texts


async def test_a_peer_that_is_not_authenticated_may_send_only_a_few_frames() -> None:
    async with serving(user="", answer=silence, pending_frames=16) as server:
        peer, recorder = await server.open()
        await peer.send(16 * frame(Opcode.PING))
        for _ in range(16):
            assert await peer.read_frame() == (Opcode.PONG, b"")
        server.pass_time(1)
        await peer.send(frame(Opcode.PING))
        assert 4429 == await peer.read_close()
        assert [] == recorder.texts


async def test_what_follows_a_hello_in_the_same_write_counts_as_authenticated() -> None:
    def answer(recorder: Recorder, text: bytes) -> None:
        if text == b"hello":
            recorder.socket.authenticated("ada")

    async with serving(user="", answer=answer, pending_frames=1) as server:
        peer, recorder = await server.open()
        await peer.send(frame(Opcode.TEXT, b"hello") + 100 * frame(Opcode.TEXT, b"more"))
        await until(lambda: len(recorder.texts) == 101)
        assert 1 == server.gateway.clients


async def test_what_follows_the_hello_of_a_user_who_has_used_up_the_share_waits() -> None:
    def answer(recorder: Recorder, text: bytes) -> None:
        if text == b"hello":
            recorder.socket.authenticated("ada")

    async with serving(user="", answer=answer) as server:
        for expected in ([b"hello", b"more"], [b"hello"]):
            before = REGISTRY.get_sample_value("rowcast_throttled_total")
            peer, recorder = await server.open()
            await peer.send(frame(Opcode.TEXT, b"hello") + frame(Opcode.TEXT, b"more"))
            await until(lambda: recorder.texts == expected)  # noqa: B023 - it is awaited here
            recorder.socket.spend(3600)
        await until(lambda: REGISTRY.get_sample_value("rowcast_throttled_total") != before)
        assert [b"hello"] == recorder.texts


async def test_the_upgrade_of_a_client_without_a_place_gets_503() -> None:
    async with serving(connections=1) as server, server.connect():
        peer = await server.raw()
        await peer.send(request("GET /v1", UPGRADE))
        assert (await peer.read_all()).startswith(b"HTTP/1.1 503 ")
