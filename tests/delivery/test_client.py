"""`Client` with a real log, and a socket whose peer reads when the test says so."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from daemon import metrics
from daemon.core.change import Position, Right, Seq, Topic
from daemon.core.close_codes import Close
from daemon.core.close_history import CloseHistory
from daemon.core.errors import GrantsUnavailable
from daemon.core.hub import Hub, RightEnd
from daemon.core.ports import AckStore, ColumnReader, Grants, SignalRights
from daemon.core.presence import Key
from daemon.delivery.client import (
    EXPIRY_NOTICE,
    FILTER_CHARGE,
    REFUSAL_CHARGE,
    RIGHT,
    SIGNAL_CHARGE,
    Client,
    ClientContext,
    bye,
)
from daemon.delivery.replay import Replay, ReplayReader
from daemon.delivery.rights import Rights
from daemon.delivery.snapshots import Snapshots
from daemon.log.columns import PgColumns
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Pool, connect
from tests.delivery.versions import ONE, SERVED, THREE, TWO, GatedLog, a_hub, versions
from tests.gateway.peers import until
from tests.support.postgres import Server
from tests.support.rows import NoColumns, NoRows
from tests.support.sharing import MemoryAcks, sharing

LIMIT = 1000  # bytes that may be queued


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


class AllowAll:
    """Grants that allow every topic."""

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        return Seq(0)


class GatedGrants:
    """Grants that wait with each answer, newest question last, until the test gives it."""

    def __init__(self) -> None:
        self.questions: list[asyncio.Future[Seq | None]] = []

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        question: asyncio.Future[Seq | None] = asyncio.get_running_loop().create_future()
        self.questions.append(question)
        return await question


class Socket:
    """A socket whose peer reads everything at once, or nothing while the socket is `full`."""

    session = "01J00000000000000000000000"
    outlet = None

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.full = False
        self.fills = False  # with the first change
        self.spent = 0.0
        self.waiting = asyncio.Event()
        self.has_room = asyncio.Event()

    def write(self, frames: bytes) -> int:
        self.frames += map(json.loads, frames.splitlines())
        self.full |= self.fills and b'"op":"changes"' in frames
        return self.queued()

    def queued(self) -> int:
        return LIMIT + 1 if self.full else 0

    async def drained(self) -> None:
        while self.full:
            self.has_room.clear()
            self.waiting.set()
            await self.has_room.wait()

    def read(self) -> None:
        """Let the peer read again."""
        self.full = False
        self.has_room.set()

    def authenticated(self, user: str) -> None:
        """There is always a place."""

    def charge(self, frames: int) -> None:
        """There is no rate."""

    def spend(self, seconds: float) -> None:
        self.spent += seconds

    def lend(self, seconds: float) -> None:
        """There is no end to what it may take in advance."""

    def has_credit(self) -> bool:
        return True

    def delay(self) -> float:
        return 0.0

    def close(self, code: int, reason: str) -> None:
        raise AssertionError(code)

    def ops(self) -> list[str]:
        return [frame["op"] for frame in self.frames]

    def seqs(self) -> list[int]:
        return [change["seq"] for frame in self.frames for change in frame.get("changes", ())]


class ClientHarness:
    """A client that has been welcomed, with its hub and its clock."""

    def __init__(
        self,
        hub: Hub,
        log_reader: PgLogReader,
        replay_reader: ReplayReader | None = None,
        grants: Grants | None = None,
        columns: ColumnReader | None = None,
        acks: AckStore | None = None,
        rights: SignalRights | None = None,
    ) -> None:
        self.hub = hub
        self.log = log_reader
        self.now = 1000.0
        self.delivery_age = 0.0
        self.close_history = CloseHistory()
        self.context = ClientContext(
            hub=hub,
            log_reader=log_reader,
            replay_reader=replay_reader or log_reader,
            rights=Rights(hub, grants or AllowAll(), self._is_delivered),
            snapshots=Snapshots(NoRows(), hub, SERVED, lambda payload: payload + b"\n", self._is_delivered),
            columns=columns or NoColumns(),
            **sharing(hub, acks=acks, rights=rights, clock=lambda: self.now),
            router=SERVED,
            authenticate=lambda _: Claims(),
            wait_until_delivered=self._is_delivered,
            delivery_age=lambda: self.delivery_age,
            close_history=self.close_history,
            encode=lambda payload: payload + b"\n",
            clock=lambda: self.now,
            heartbeat=20.0,
            schema=str,
            max_topics=128,
            frame_bytes=1000,
            queue_bytes=LIMIT,
        )
        self.hello()

    def hello(self, **members: object) -> None:
        """Connect anew."""
        self.socket = Socket()
        self.client = Client(self.context, self.socket)
        self.say(op="hello", token="t", **members)

    async def _is_delivered(self, seq: Seq) -> None:
        """Return at once: the hub has delivered everything."""

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
        revocations = [RightEnd(seq, right, lambda _: True) for seq, right in ends]
        self.hub.publish(changes, Position(self.hub.position.epoch, Seq(upto)), lambda _: (), revocations)

    def beat(self) -> dict[str, Any] | None:
        """The frame sent at the next heartbeat; None if there is none."""
        before = len(self.socket.frames)
        self.now += 30
        self.client.tick(self.now)
        return self.socket.frames[before] if len(self.socket.frames) > before else None


@pytest.fixture
async def harness(pool: Pool) -> ClientHarness:
    """A client of a hub at 8, which has delivered the first version of every row."""
    hub = await a_hub(pool)
    hub.position = Position(hub.position.epoch, Seq(8))
    return ClientHarness(hub, PgLogReader(pool))


async def test_a_slow_client_gets_no_live_changes_and_catches_up_once_it_has_read(harness: ClientHarness) -> None:
    for topic in (ONE, TWO):
        await harness.subscribe(topic)
    times, slow = metrics.BEHIND._value.get(), metrics.CLIENTS_BEHIND._value.get()
    harness.socket.full = True
    await harness.publish(16)
    assert 0 == harness.hub.subscriptions
    assert (slow + 1, times + 1) == (metrics.CLIENTS_BEHIND._value.get(), metrics.BEHIND._value.get())
    sent = len(harness.socket.frames)
    await harness.publish(20)
    await harness.publish(24)
    await harness.socket.waiting.wait()
    assert sent == len(harness.socket.frames)
    harness.socket.read()
    await harness.until(lambda: "resumed" in harness.socket.ops())
    assert (2, slow) == (harness.hub.subscriptions, metrics.CLIENTS_BEHIND._value.get())
    seqs = harness.socket.seqs()
    assert sorted(set(seqs)) == seqs
    assert 4 == len(seqs)  # two rows, two versions each


async def test_a_change_that_waits_only_because_it_is_large_leaves_its_client_live(harness: ClientHarness) -> None:
    await harness.subscribe(ONE)
    harness.socket.fills = True
    await harness.publish(16)
    assert 1 == harness.hub.subscriptions
    await harness.publish(24)
    assert 0 == harness.hub.subscriptions
    harness.socket.fills = False
    harness.socket.read()
    await harness.until(lambda: "resumed" in harness.socket.ops())
    assert sorted(set(harness.socket.seqs())) == harness.socket.seqs()


async def test_a_client_that_leaves_its_replay_has_it_counted(harness: ClientHarness) -> None:
    await harness.publish(16)
    harness.socket.fills = True
    await harness.subscribe(ONE, since=1)
    await harness.socket.waiting.wait()
    assert RIGHT == harness.socket.spent  # only what looking up the right takes
    harness.client.connection_lost(None)
    assert harness.socket.spent > RIGHT
    await harness.until(lambda: not harness.context.replays)


async def test_a_slow_clients_new_subscription_waits_for_its_other_topics(harness: ClientHarness) -> None:
    await harness.subscribe(ONE)
    harness.socket.full = True
    await harness.publish(16)
    await harness.subscribe(TWO)
    await harness.publish(24)
    assert 0 == harness.hub.subscriptions
    harness.socket.read()
    await harness.until(lambda: "resumed" in harness.socket.ops())
    assert 3 == len(harness.socket.seqs())
    assert sorted(harness.socket.seqs()) == harness.socket.seqs()


async def test_a_heartbeat_has_no_position_during_a_replay(pool: Pool) -> None:
    hub, gated = await a_hub(pool), GatedLog(pool)
    harness = ClientHarness(hub, PgLogReader(pool), gated)
    await harness.subscribe(ONE)
    assert {"op": "head", "pos": str(hub.position)} == harness.beat()
    await harness.subscribe(TWO, since=8)
    await gated.reading.wait()
    assert {"op": "head"} == harness.beat()
    gated.go.set()
    await harness.until(lambda: "resumed" in harness.socket.ops())
    assert {"op": "head", "pos": str(hub.position)} == harness.beat()


async def test_a_token_that_expires_before_the_next_tick_has_a_timer(
    harness: ClientHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, remaining = asyncio.get_running_loop(), EXPIRY_NOTICE / 2
    monkeypatch.setattr(Claims, "expires", time.time() + remaining)
    earliest = loop.time() + remaining
    timers: list[float] = []
    monkeypatch.setattr(loop, "call_later", lambda delay, *_: timers.append(loop.time() + delay))
    harness.hello()
    assert 1 == len(timers)
    assert earliest - 0.1 < timers[0] <= loop.time() + remaining


async def test_no_heartbeats_are_queued_for_a_client_that_does_not_read(harness: ClientHarness) -> None:
    harness.socket.full = True
    assert [None] * 5 == [harness.beat() for _ in range(5)]
    harness.socket.full = False
    harness.delivery_age = 6.0
    assert {"op": "head", "pos": str(harness.hub.position), "stale": True} == harness.beat()


async def test_a_stale_log_and_its_recovery_are_each_reported_once_at_the_next_tick(harness: ClientHarness) -> None:
    sent = len(harness.socket.frames)
    for delivery_age in (4.9, 5.1, 6.1, 0.1, 1.0):
        harness.delivery_age = delivery_age
        harness.client.tick(harness.now)
    pos = str(harness.hub.position)
    assert [{"op": "head", "pos": pos, "stale": True}, {"op": "head", "pos": pos}] == harness.socket.frames[sent:]


async def test_a_right_that_ends_while_a_client_is_slow_ends_its_replay_of_the_topic(harness: ClientHarness) -> None:
    for topic in (ONE, TWO):
        await harness.subscribe(topic)
    harness.socket.full = True
    await harness.publish(12)
    await harness.publish(24, (Seq(20), Right("ada", ONE)))
    harness.socket.read()
    await harness.until(lambda: "resumed" in harness.socket.ops())
    [revoked] = [frame for frame in harness.socket.frames if frame["op"] == "revoked"]
    assert (ONE, f"{harness.hub.position.epoch}:20") == (revoked["topic"], revoked["pos"])
    later = harness.socket.frames[harness.socket.frames.index(revoked) :]
    assert {TWO} == {frame["topic"] for frame in later if frame["op"] == "changes"}
    assert 1 == harness.hub.subscriptions


async def test_a_discontinuity_resets_every_topic_of_a_slow_client_before_anything_else(
    harness: ClientHarness,
) -> None:
    for topic in (ONE, TWO, THREE):
        await harness.subscribe(topic)
    harness.socket.full = True
    await harness.publish(16)
    harness.hub.move(Position(harness.hub.position.epoch, Seq(10_000_024)), "crash")
    sent = len(harness.socket.frames)
    harness.socket.read()
    await harness.until(lambda: "resumed" in harness.socket.ops())
    assert ["reset", "reset", "reset", "resumed"] == harness.socket.ops()[sent:]
    assert 3 == harness.hub.subscriptions


async def test_only_the_session_that_was_closed_is_sent_the_reason_when_it_returns(harness: ClientHarness) -> None:
    harness.client.connection_lost(Close(4408, "too_slow"))
    for session, last_close in ((harness.socket.session, {"code": 4408, "reason": "too_slow"}), ("another", None)):
        returning = Socket()
        hello = {"op": "hello", "token": "t", "session": session}
        Client(harness.context, returning).message_received(json.dumps(hello).encode())
        assert last_close == returning.frames[0].get("last_close")


async def test_nothing_remains_of_a_slow_client_that_disconnects(harness: ClientHarness) -> None:
    slow = metrics.CLIENTS_BEHIND._value.get()
    await harness.subscribe(ONE)
    harness.socket.full = True
    await harness.publish(16)
    harness.client.connection_lost(None)
    assert (0, slow) == (harness.hub.subscriptions, metrics.CLIENTS_BEHIND._value.get())
    await harness.publish(24, (Seq(20), Right("ada", ONE)))
    assert "revoked" not in harness.socket.ops()


@pytest.fixture
async def gated(pool: Pool) -> tuple[ClientHarness, GatedGrants]:
    """A client that follows ONE live, behind a discontinuity: its right is being looked up again."""
    grants = GatedGrants()
    harness = ClientHarness(await a_hub(pool), PgLogReader(pool), grants=grants)
    harness.say(op="subscribe", topic=ONE)
    await harness.until(lambda: len(grants.questions) == 1)
    grants.questions[0].set_result(Seq(0))
    await harness.until(lambda: harness.hub.subscriptions == 1)
    harness.hub.move(Position(harness.hub.position.epoch, Seq(10_000_024)), "crash")
    await harness.until(lambda: len(grants.questions) == 2)
    return harness, grants


async def test_a_topic_that_was_left_while_its_right_was_looked_up_again_is_not_watched(
    gated: tuple[ClientHarness, GatedGrants],
) -> None:
    harness, grants = gated
    harness.say(op="unsubscribe", topic=ONE)
    harness.hub.move(Position(harness.hub.position.epoch, Seq(20_000_024)), "crash")
    grants.questions[1].set_result(Seq(0))
    await harness.until(lambda: len(grants.questions) == 3)
    grants.questions[2].set_result(Seq(0))
    await harness.until(lambda: "resumed" in harness.socket.ops())
    harness.hub.publish([], harness.hub.position, lambda _: (), [RightEnd(Seq(1), Right("ada", ONE), lambda _: True)])
    assert "revoked" not in harness.socket.ops()
    assert {} == harness.hub._pending


async def test_a_topic_that_was_left_and_requested_again_is_not_revoked_by_the_older_answer(
    gated: tuple[ClientHarness, GatedGrants],
) -> None:
    harness, grants = gated
    since = f"{harness.hub.position.epoch}:{harness.hub.position.seq}"
    harness.say(op="unsubscribe", topic=ONE)
    harness.say(op="subscribe", topic=ONE)
    await harness.until(lambda: len(grants.questions) == 3)
    grants.questions[2].set_result(Seq(0))
    await harness.until(lambda: harness.socket.ops().count("subscribed") == 2)
    grants.questions[1].set_result(None)  # an answer to the subscription that was left
    await harness.until(lambda: len(grants.questions) == 4)
    grants.questions[3].set_result(Seq(0))
    await harness.until(lambda: "resumed" in harness.socket.ops())
    assert ("revoked" not in harness.socket.ops(), since) == (True, harness.socket.frames[-1]["pos"])
    assert 1 == harness.hub.subscriptions


async def test_a_right_that_is_lost_and_granted_again_across_a_discontinuity_refuses_the_subscribe(
    pool: Pool,
) -> None:
    class GatedContinuity(PgLogReader):
        asked, go = asyncio.Event(), asyncio.Event()

        async def continuity(self, since: Position) -> str | None:
            self.asked.set()
            await self.go.wait()
            return await super().continuity(since)

    grants, log = GatedGrants(), GatedContinuity(pool)
    harness = ClientHarness(await a_hub(pool), log, grants=grants)
    harness.say(op="subscribe", topic=ONE, since=f"{harness.hub.position.epoch}:8")
    await harness.until(lambda: len(grants.questions) == 1)
    grants.questions[0].set_result(Seq(0))
    await log.asked.wait()
    position = Position(harness.hub.position.epoch, Seq(25))
    harness.hub.publish([], position, lambda _: (), [RightEnd(Seq(25), Right("ada", ONE), lambda _: True)])
    harness.hub.move(Position(position.epoch, Seq(10_000_024)), "crash")
    log.go.set()
    await harness.until(lambda: len(grants.questions) == 2)
    grants.questions[1].set_result(Seq(0))
    await harness.until(lambda: harness.socket.ops()[-1] == "error")
    assert ["revoked", "error"] == harness.socket.ops()[-2:]
    assert {} == harness.hub._pending


async def test_a_topic_requested_again_from_the_same_place_during_a_read_is_replayed(pool: Pool) -> None:
    hub, log = await a_hub(pool), GatedLog(pool)
    harness = ClientHarness(hub, PgLogReader(pool), log)
    await harness.subscribe(ONE, since=8)
    await log.reading.wait()
    harness.say(op="unsubscribe", topic=ONE)
    await harness.subscribe(ONE, since=8)
    log.go.set()
    await harness.until(lambda: "resumed" in harness.socket.ops())
    [frame] = [frame for frame in harness.socket.frames if frame["op"] == "changes"]
    assert (f"{hub.position.epoch}:8", 2) == (frame["prev"], len(frame["changes"]))


async def test_a_client_that_is_lost_during_a_replay_leaves_nothing_to_the_garbage_collector(pool: Pool) -> None:
    log = GatedLog(pool)
    harness = ClientHarness(await a_hub(pool), PgLogReader(pool), log)
    await harness.subscribe(ONE, since=8)
    await log.reading.wait()
    gc.collect()
    gc.disable()
    try:
        harness.client.connection_lost(None)
        del harness.client
        for _ in range(5):  # the cancelled task ends
            await asyncio.sleep(0)
        assert [] == [found for found in gc.get_objects() if isinstance(found, Client | Replay)]
    finally:
        gc.enable()


NOT_TWO = {"rows": {"version": {"ne": 2}}}


@pytest.fixture
async def filtering(pool: Pool) -> ClientHarness:
    """A client, which may filter, of a hub at 8."""
    hub = await a_hub(pool)
    hub.position = Position(hub.position.epoch, Seq(8))
    return ClientHarness(hub, PgLogReader(pool), columns=PgColumns(pool, SERVED.schema_of))


def sent_changes(harness: ClientHarness) -> list[tuple[str, int | None]]:
    """The kind and the version of each change."""
    changes = [change for frame in harness.socket.frames for change in frame.get("changes", ())]
    return [(change["kind"], change.get("record", {}).get("version")) for change in changes]


async def test_a_slow_client_gets_from_the_log_what_its_filter_shows(filtering: ClientHarness) -> None:
    filtering.say(op="subscribe", topic=ONE, where=NOT_TWO, columns={"rows": ["version"]})
    await filtering.until(lambda: "subscribed" in filtering.socket.ops())
    filtering.socket.full = True
    await filtering.publish(16)
    assert [("delete", None)] == sent_changes(filtering)
    assert 0 == filtering.hub.subscriptions
    await filtering.publish(24)
    filtering.socket.read()
    await filtering.until(lambda: "resumed" in filtering.socket.ops())
    assert [("delete", None), ("update", 3)] == sent_changes(filtering)
    assert {"version": 3} == filtering.socket.frames[-2]["changes"][0]["record"]
    assert 1 == filtering.hub.subscriptions


async def test_a_client_that_resumes_with_a_filter_gets_only_what_it_shows_and_no_gap(
    filtering: ClientHarness,
) -> None:
    since = f"{filtering.hub.position.epoch}:8"
    filtering.hub.position = Position(filtering.hub.position.epoch, Seq(16))
    filtering.say(op="subscribe", topic=ONE, since=since, where={"rows": {"version": {"gt": 2}}})
    await filtering.until(lambda: "resumed" in filtering.socket.ops())
    await filtering.publish(24)
    assert [("delete", None), ("update", 3)] == sent_changes(filtering)
    live = filtering.socket.frames[-1]
    assert f"{filtering.hub.position.epoch}:16" == live["prev"]


async def test_a_filter_that_is_wrong_is_refused_and_charged(
    filtering: ClientHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    monkeypatch.setattr(filtering.socket, "charge", charged.append)
    wrong = metrics.ERRORS.labels(code="bad_filter")._value.get()
    filtering.say(op="subscribe", id=7, topic=ONE, where={"rows": {"color": {"eq": 1}}})
    await filtering.until(lambda: "error" in filtering.socket.ops())
    error = filtering.socket.frames[-1]
    assert (7, "bad_filter", False) == (error["id"], error["code"], error["retry"])
    assert ([REFUSAL_CHARGE], wrong + 1) == (charged, metrics.ERRORS.labels(code="bad_filter")._value.get())
    await filtering.subscribe(ONE)


async def test_filters_are_charged_and_those_of_a_connection_are_limited_together(
    filtering: ClientHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    monkeypatch.setattr(filtering.socket, "charge", charged.append)
    filtering.client._session.max_filter = 120
    for topic in (ONE, TWO):
        filtering.say(op="subscribe", topic=topic, where=NOT_TWO)
    await filtering.until(lambda: "error" in filtering.socket.ops())
    assert ["subscribed", "error"] == filtering.socket.ops()[-2:]
    assert "filter_too_large" == filtering.socket.frames[-1]["code"]
    assert [FILTER_CHARGE, REFUSAL_CHARGE] == charged
    filtering.say(op="unsubscribe", topic=ONE)
    filtering.say(op="subscribe", topic=TWO, where=NOT_TWO)
    await filtering.until(lambda: "subscribed" == filtering.socket.ops()[-1])


async def test_who_filters_can_be_present_and_who_is_refused_is_not(filtering: ClientHarness) -> None:
    presence = filtering.context.presence
    wrong = {"rows": {"color": {"eq": 1}}}
    filtering.say(op="subscribe", topic=ONE, where=wrong, presence={})
    filtering.say(op="subscribe", topic=TWO, where=NOT_TWO, presence={"data": {"n": 1}})
    await filtering.until(lambda: "subscribed" in filtering.socket.ops())
    await presence.round()
    assert ["error", "subscribed", "presence"] == filtering.socket.ops()[1:]
    assert TWO == filtering.socket.frames[-1]["topic"]
    filtering.say(op="presence", topic=ONE, data={})
    assert "not_subscribed" == filtering.socket.frames[-1]["code"]


async def test_a_filter_whose_columns_cannot_be_looked_up_can_be_sent_again(harness: ClientHarness) -> None:
    harness.say(op="subscribe", topic=ONE, where=NOT_TWO)
    await harness.until(lambda: "error" in harness.socket.ops())
    assert ("unavailable", True) == (harness.socket.frames[-1]["code"], harness.socket.frames[-1]["retry"])


async def test_a_topic_that_may_not_be_read_says_nothing_about_its_columns(pool: Pool) -> None:
    class AllowNone:
        async def readable_from(self, user: str, topic: Topic) -> Seq | None:
            return None

    reader = PgColumns(pool, SERVED.schema_of)
    harness = ClientHarness(await a_hub(pool), PgLogReader(pool), grants=AllowNone(), columns=reader)
    for topic in (ONE, "nothing:1"):
        harness.say(op="subscribe", topic=topic, where={"rows": {"color": {"eq": 1}}})
        await harness.until(lambda: "error" in harness.socket.ops())
        assert "no_such_topic" == harness.socket.frames.pop()["code"]


async def test_a_crowd_looks_up_the_columns_once(pool: Pool) -> None:
    reader = PgColumns(pool, SERVED.schema_of)
    found = await asyncio.gather(*(reader.columns(topic) for topic in (ONE, TWO, THREE)))
    assert found[0] is found[1] is found[2]
    assert {"id", "version"} == set(found[0]["rows"])


async def test_more_signals_than_ten_a_second_are_dropped_and_the_connection_stays(harness: ClientHarness) -> None:
    await harness.subscribe(ONE)
    other = ClientHarness(harness.hub, harness.log)
    await other.subscribe(ONE)
    for number in range(12):
        harness.say(op="signal", id=number, topic=ONE, name="n", data=number)
    signals = [frame for frame in other.socket.frames if frame["op"] == "signal"]
    assert list(range(10)) == [frame["data"] for frame in signals]
    errors = [frame for frame in harness.socket.frames if frame["op"] == "error"]
    assert [(10, "too_many_signals"), (11, "too_many_signals")] == [(error["id"], error["code"]) for error in errors]
    harness.now += 0.35
    for number in range(5):
        harness.say(op="signal", topic=ONE, name="n", data=number)
    assert 13 == other.socket.ops().count("signal")
    assert "signal" not in harness.socket.ops()


async def test_a_signal_counts_as_many_frames_because_many_may_get_it(
    harness: ClientHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    charged: list[int] = []
    await harness.subscribe(ONE)
    monkeypatch.setattr(harness.socket, "charge", charged.append)
    for number in range(12):
        harness.say(op="signal", topic=ONE, name="n", data=number)
    assert [SIGNAL_CHARGE] * 10 == charged


async def test_a_signal_needs_a_followed_topic_and_a_bounded_size(harness: ClientHarness) -> None:
    await harness.subscribe(ONE)
    other = ClientHarness(harness.hub, harness.log)
    await other.subscribe(ONE)
    harness.say(op="signal", topic=TWO, name="n")
    harness.say(op="signal", topic=ONE, name="n", data="é" * 8192)
    harness.say(op="signal", topic=ONE, name="")
    harness.say(op="signal", topic=ONE, name="n" * 65)
    harness.say(op="signal", topic=ONE, name="n", data="é" * 8191)
    expected = ["not_subscribed", "signal_too_large", "bad_frame", "bad_frame"]
    assert expected == [frame["code"] for frame in harness.socket.frames if frame["op"] == "error"]
    assert [8191] == [len(frame["data"]) for frame in other.socket.frames if frame["op"] == "signal"]


async def test_a_client_that_does_not_read_gets_no_signals_and_is_not_behind_because_of_them(
    harness: ClientHarness,
) -> None:
    await harness.subscribe(ONE)
    sender = ClientHarness(harness.hub, harness.log)
    await sender.subscribe(ONE)
    dropped = metrics.SIGNALS_DROPPED.labels(reason="slow")._value.get()
    harness.socket.full = True
    sender.say(op="signal", topic=ONE, name="n")
    assert "signal" not in harness.socket.ops()
    assert dropped + 1 == metrics.SIGNALS_DROPPED.labels(reason="slow")._value.get()
    assert 2 == harness.hub.subscriptions
    harness.socket.read()


async def test_presence_begins_with_a_subscription_and_ends_with_it_or_with_the_right(harness: ClientHarness) -> None:
    presence = harness.context.presence
    for end in ("unsubscribe", "revoke", "disconnect"):
        harness.say(op="subscribe", topic=ONE, presence={"data": {"n": 1}})
        await harness.until(lambda: "subscribed" in harness.socket.ops())
        await presence.round()
        [state] = [frame["state"] for frame in harness.socket.frames if frame["op"] == "presence"]
        assert {
            "ada": [{"device": harness.socket.session, "data": {"n": 1}, "since": state["ada"][0]["since"]}]
        } == state
        harness.socket.frames.clear()
        match end:
            case "unsubscribe":
                harness.say(op="unsubscribe", topic=ONE)
            case "revoke":
                await harness.publish(9, (Seq(9), Right("ada", ONE)))
            case "disconnect":
                harness.client.connection_lost(None)
        await presence.round()
        assert "presence" not in harness.socket.ops()
        assert (end == "disconnect") == (presence.pause() is not None and presence.pause() != 0)
        harness.socket.frames.clear()


async def test_what_is_said_of_a_presence_is_bounded_and_needs_one(harness: ClientHarness) -> None:
    harness.say(op="subscribe", topic=ONE, presence={"data": {"text": "x" * 1024}})
    harness.say(op="subscribe", topic=ONE, presence={"data": []})
    harness.say(op="subscribe", topic=ONE, presence={"more": 1})
    harness.say(op="presence", topic=ONE, data={})
    codes = [frame["code"] for frame in harness.socket.frames if frame["op"] == "error"]
    assert ["presence_too_large", "bad_frame", "bad_frame", "not_subscribed"] == codes
    assert 0 == harness.hub.subscriptions


async def test_a_device_resumes_from_the_position_that_it_acknowledged(pool: Pool) -> None:
    hub = await a_hub(pool)
    position = Position(hub.position.epoch, Seq(8))
    known = MemoryAcks()
    running = ClientHarness(hub, PgLogReader(pool), acks=known)
    running.hello(device="desk")
    running.say(op="ack", pos=str(position))
    assert position == await running.context.acks.recall(Key("ada", "desk"))  # before it is stored
    storing = asyncio.create_task(running.context.acks.run())
    await running.until(lambda: bool(known.acks))
    storing.cancel()
    for device, since in (("desk", str(position)), ("another", None)):
        harness = ClientHarness(hub, PgLogReader(pool), acks=known)
        harness.hello(device=device, since="stored")
        harness.say(op="subscribe", topic=ONE)  # it need not wait for the answer
        await harness.until(lambda harness=harness: "subscribed" in harness.socket.ops())  # type: ignore[misc]
        welcome, subscribed = harness.socket.frames[:2]
        assert since == welcome.get("since")
        assert (since or str(hub.position)) == subscribed["pos"]
        harness.client.connection_lost(None)


class GatedSignals:
    """SignalRights that answer with what the test says, or not at all."""

    def __init__(self) -> None:
        self.answer: bool | None = None
        self.questions: list[str] = []

    def concerns(self, topic: Topic) -> bool:
        return topic == ONE

    async def may_signal(self, user: str, topic: Topic) -> bool:
        self.questions.append(user)
        if self.answer is None:
            raise GrantsUnavailable("broken")
        return self.answer


async def test_a_pack_can_say_who_may_signal_and_its_answer_counts_for_a_while(pool: Pool) -> None:
    rights, hub = GatedSignals(), await a_hub(pool)
    harness, other = ClientHarness(hub, PgLogReader(pool), rights=rights), ClientHarness(hub, PgLogReader(pool))
    for topic in (ONE, TWO):
        await harness.subscribe(topic)
        await other.subscribe(topic)
    for answer in (None, False, True):
        rights.answer = answer
        harness.say(op="signal", id=str(answer), topic=ONE, name="n")
        harness.say(op="signal", topic=TWO, name=str(answer))
        await harness.until(lambda answer=answer: str(answer) in str(other.socket.frames))  # type: ignore[misc]
    errors = [(frame["id"], frame["code"]) for frame in harness.socket.frames if frame["op"] == "error"]
    assert [("None", "unavailable"), ("False", "may_not_signal"), ("True", "may_not_signal")] == errors
    assert 2 == len(rights.questions)


@pytest.mark.parametrize(("clients", "most"), [(0, 250), (3, 253), (1000, 1250), (100_000, 5000)])
def test_few_clients_are_asked_to_return_at_once_and_many_over_seconds(clients: int, most: int) -> None:
    asked = [json.loads(bye("restart", clients))["retry_ms"] for _ in range(300)]
    assert most // 2 < max(asked) <= most
