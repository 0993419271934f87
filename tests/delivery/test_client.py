"""One client's life, over a real log and a socket whose peer reads when the test says so."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from daemon import metrics
from daemon.core.change import Position, Right, Seq, Topic
from daemon.core.close_codes import Close
from daemon.core.close_history import CloseHistory
from daemon.core.hub import Hub, RightEnd
from daemon.delivery.client import Client, ClientContext
from daemon.delivery.replay import ReplayReader
from daemon.delivery.rights import Rights
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Pool, connect
from tests.delivery.versions import ONE, SERVED, THREE, TWO, GatedLog, a_hub, versions
from tests.gateway.peers import until
from tests.support.postgres import Server

LIMIT = 1000  # bytes that may wait


@pytest.fixture(scope="module")
async def pool(postgres: Server) -> AsyncIterator[Pool]:
    async with postgres.chatgenius() as database:
        sql = await connect(database, application_name="test")
        async with versions(database, sql) as pool:
            yield pool
        await sql.close()


class Claims:
    user = "ada"
    expires = float("inf")


class Anybody:
    """Grants that keep nothing from anybody."""

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        return Seq(0)


class Socket:
    """Its peer takes everything at once, but while it is `full`: then nothing."""

    session = "01J00000000000000000000000"

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.full = False
        self.waits = asyncio.Event()
        self.room = asyncio.Event()

    def write(self, frames: bytes) -> int:
        self.frames += map(json.loads, frames.splitlines())
        return self.queued()

    def queued(self) -> int:
        return LIMIT + 1 if self.full else 0

    async def drained(self) -> None:
        while self.full:
            self.room.clear()
            self.waits.set()
            await self.room.wait()

    def read(self) -> None:
        """The peer reads on."""
        self.full = False
        self.room.set()

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(code)

    def ops(self) -> list[str]:
        return [frame["op"] for frame in self.frames]

    def seqs(self) -> list[int]:
        return [change["seq"] for frame in self.frames for change in frame.get("changes", ())]


class Life:
    """A client that was welcomed, its hub, and the time."""

    def __init__(self, hub: Hub, log_reader: PgLogReader, replay_reader: ReplayReader | None = None) -> None:
        self.hub = hub
        self.log = log_reader
        self.now = 1000.0
        self.read_age = 0.0
        self.close_history = CloseHistory()
        self.context = ClientContext(
            hub=hub,
            log_reader=log_reader,
            replay_reader=replay_reader or log_reader,
            rights=Rights(hub, Anybody(), self._is_delivered),
            router=SERVED,
            authenticate=lambda _: Claims(),
            wait_until_delivered=self._is_delivered,
            read_age=lambda: self.read_age,
            close_history=self.close_history,
            encode=lambda payload: payload + b"\n",
            clock=lambda: self.now,
            heartbeat=20.0,
            schema="",
            frame_bytes=1000,
            queue_bytes=LIMIT,
        )
        self.socket = Socket()
        self.client = Client(self.context, self.socket)
        self.say(op="hello", token="t")

    async def _is_delivered(self, seq: Seq) -> None:
        """At once: the hub has delivered everything."""

    def say(self, **frame: object) -> None:
        self.client.message_received(json.dumps(frame).encode())

    async def until(self, condition: Callable[[], bool]) -> None:
        await until(condition)

    async def subscribe(self, topic: Topic, since: int | None = None) -> None:
        before = self.socket.ops().count("subscribed")
        position = since and f"{self.hub.position.epoch}:{since}"
        self.say(op="subscribe", topic=topic, since=position or None)
        await self.until(lambda: self.socket.ops().count("subscribed") > before)

    async def publish(self, upto: int, *ends: tuple[Seq, Right]) -> None:
        """Move the hub along the log, as the pump does."""
        changes = [change for change in await self.log.read(self.hub.position.seq, 100) if change.seq <= upto]
        gone = [RightEnd(seq, right, lambda _: True) for seq, right in ends]
        self.hub.publish(changes, Position(self.hub.position.epoch, Seq(upto)), lambda _: (), gone)

    def beat(self) -> dict[str, Any] | None:
        """What is said at the next heartbeat, if anything is."""
        before = len(self.socket.frames)
        self.now += 30
        self.client.tick(self.now)
        return self.socket.frames[before] if len(self.socket.frames) > before else None


@pytest.fixture
async def life(pool: Pool) -> Life:
    """At 8: the hub has told the first version of every row."""
    hub = await a_hub(pool)
    hub.position = Position(hub.position.epoch, Seq(8))
    return Life(hub, PgLogReader(pool))


async def test_a_slow_client_has_nothing_live_and_receives_the_rest_when_it_has_read(life: Life) -> None:
    for topic in (ONE, TWO):
        await life.subscribe(topic)
    times, slow = metrics.BEHIND._value.get(), metrics.CLIENTS_BEHIND._value.get()
    life.socket.full = True
    await life.publish(16)
    assert 0 == life.hub.subscriptions
    assert (slow + 1, times + 1) == (metrics.CLIENTS_BEHIND._value.get(), metrics.BEHIND._value.get())
    sent = len(life.socket.frames)
    await life.publish(20)
    await life.publish(24)
    await life.socket.waits.wait()
    assert sent == len(life.socket.frames)
    life.socket.read()
    await life.until(lambda: "resumed" in life.socket.ops())
    assert (2, slow) == (life.hub.subscriptions, metrics.CLIENTS_BEHIND._value.get())
    seqs = life.socket.seqs()
    assert sorted(set(seqs)) == seqs
    assert 4 == len(seqs)  # two rows, two versions each


async def test_what_a_slow_client_subscribes_to_waits_for_its_other_topics(life: Life) -> None:
    await life.subscribe(ONE)
    life.socket.full = True
    await life.publish(16)
    await life.subscribe(TWO)
    await life.publish(24)
    assert 0 == life.hub.subscriptions
    life.socket.read()
    await life.until(lambda: "resumed" in life.socket.ops())
    assert 3 == len(life.socket.seqs())
    assert sorted(life.socket.seqs()) == life.socket.seqs()


async def test_no_heartbeat_names_a_position_before_everything_has_been_sent(pool: Pool) -> None:
    hub, gated = await a_hub(pool), GatedLog(pool)
    life = Life(hub, PgLogReader(pool), gated)
    await life.subscribe(ONE)
    assert {"op": "head", "pos": str(hub.position)} == life.beat()
    await life.subscribe(TWO, since=8)
    await gated.reading.wait()
    assert {"op": "head"} == life.beat()
    gated.go.set()
    await life.until(lambda: "resumed" in life.socket.ops())
    assert {"op": "head", "pos": str(hub.position)} == life.beat()


async def test_heartbeats_do_not_pile_up_for_who_does_not_read(life: Life) -> None:
    life.socket.full = True
    assert [None] * 5 == [life.beat() for _ in range(5)]
    life.socket.full = False
    life.read_age = 6.0
    assert {"op": "head", "pos": str(life.hub.position), "stale": True} == life.beat()


async def test_a_stale_log_is_reported_once_at_the_next_tick_and_so_is_its_return(life: Life) -> None:
    sent = len(life.socket.frames)
    for silence in (4.9, 5.1, 6.1, 0.1, 1.0):
        life.read_age = silence
        life.client.tick(life.now)
    pos = str(life.hub.position)
    assert [{"op": "head", "pos": pos, "stale": True}, {"op": "head", "pos": pos}] == life.socket.frames[sent:]


async def test_a_right_that_ends_while_a_client_is_slow_ends_its_replay_of_the_topic(life: Life) -> None:
    for topic in (ONE, TWO):
        await life.subscribe(topic)
    life.socket.full = True
    await life.publish(12)
    await life.publish(24, (Seq(20), Right("ada", ONE)))
    life.socket.read()
    await life.until(lambda: "resumed" in life.socket.ops())
    [revoked] = [frame for frame in life.socket.frames if frame["op"] == "revoked"]
    assert (ONE, f"{life.hub.position.epoch}:20") == (revoked["topic"], revoked["pos"])
    later = life.socket.frames[life.socket.frames.index(revoked) :]
    assert {TWO} == {frame["topic"] for frame in later if frame["op"] == "changes"}
    assert 1 == life.hub.subscriptions


async def test_numbers_that_are_lost_reset_every_topic_of_a_slow_client_before_anything_else(life: Life) -> None:
    for topic in (ONE, TWO, THREE):
        await life.subscribe(topic)
    life.socket.full = True
    await life.publish(16)
    life.hub.move(Position(life.hub.position.epoch, Seq(10_000_024)), "crash")
    sent = len(life.socket.frames)
    life.socket.read()
    await life.until(lambda: "resumed" in life.socket.ops())
    assert ["reset", "reset", "reset", "resumed"] == life.socket.ops()[sent:]
    assert 3 == life.hub.subscriptions


async def test_a_client_whose_connection_was_closed_learns_why_and_no_other_does(life: Life) -> None:
    life.client.connection_lost(Close(4408, "too_slow"))
    for session, last_close in ((life.socket.session, {"code": 4408, "reason": "too_slow"}), ("another", None)):
        back = Socket()
        hello = {"op": "hello", "token": "t", "session": session}
        Client(life.context, back).message_received(json.dumps(hello).encode())
        assert last_close == back.frames[0].get("last_close")


async def test_a_slow_client_that_goes_leaves_nothing_behind(life: Life) -> None:
    slow = metrics.CLIENTS_BEHIND._value.get()
    await life.subscribe(ONE)
    life.socket.full = True
    await life.publish(16)
    life.client.connection_lost(None)
    assert (0, slow) == (life.hub.subscriptions, metrics.CLIENTS_BEHIND._value.get())
    await life.publish(24, (Seq(20), Right("ada", ONE)))
    assert "revoked" not in life.socket.ops()
