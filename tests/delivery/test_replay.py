"""`Replay` from a client's position to the head, over a real log whose reads a test can hold up."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from itertools import count
from typing import Any

import pytest

from daemon.core.change import Change, Kind, Numbers, Position, Seq, Topic
from daemon.core.errors import LogUnavailable
from daemon.core.filters import View
from daemon.core.hub import Hub
from daemon.core.ports import Batch
from daemon.delivery.client import RIGHT
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.replay import (
    FEW,
    LIVE_WEIGHT,
    READ,
    SLICE,
    SMALL_READ,
    Replay,
    ReplayReader,
    RetryingLogReader,
    Turns,
)
from daemon.gateway.admission import Accounts
from daemon.gateway.limits import Limits
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Connection, Pool, connect
from daemon.relay.remote import RemoteLogReader
from tests.delivery.versions import ONE, SERVED, THREE, TWO, GatedLog, a_hub, versions
from tests.support.log import leader, until_numbered
from tests.support.postgres import Server
from tests.support.relay import asking


class Recorder:
    """A ReplayTarget that records the frames it is sent and the topics that have joined."""

    numbers = Numbers.JSON

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.joined: list[Topic] = []

    async def readable_topics(self) -> dict[Topic, Seq]:
        return {}

    def view(self, topic: Topic) -> View | None:
        return None

    def join(self, topic: Topic) -> None:
        self.joined.append(topic)

    def send(self, payload: bytes) -> None:
        self.frames.append(json.loads(payload))

    def send_encoded(self, frame: bytes) -> None:
        self.frames.append(json.loads(frame))

    def too_slow(self, topic: Topic) -> None:
        raise AssertionError(topic)

    async def drained(self) -> None:
        """Return at once."""

    def spend(self, seconds: float) -> None:
        """There is no share."""

    def lend(self, seconds: float) -> None:
        """There is no end to what it may take in advance."""

    def has_credit(self) -> bool:
        return True

    def delay(self) -> float:
        return 0.0

    def versions(self, topic: Topic) -> list[int]:
        return [
            change["record"]["version"]
            for frame in self.frames
            if frame["op"] == "changes" and frame["topic"] == topic
            for change in frame["changes"]
        ]


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module")
async def sql(database: str) -> AsyncIterator[Connection]:
    connection = await connect(database, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture(scope="module")
async def pool(database: str, sql: Connection) -> AsyncIterator[Pool]:
    async with versions(database, sql) as pool:
        yield pool


def a_replay(
    hub: Hub, recorder: Recorder, log: ReplayReader, positions: dict[Topic, int], *, limit: int = 1000
) -> Replay:
    """A replay of these topics, each from its position."""
    replay = Replay(recorder, log, hub, SERVED, limit=limit, discontinuity=hub.discontinuity)
    for topic, position in positions.items():
        replay.add(topic, Seq(position))
    return replay


async def test_missed_changes_are_sent_in_order_and_then_the_topic_joins(pool: Pool) -> None:
    hub, recorder = await a_hub(pool), Recorder()
    replay = a_replay(hub, recorder, PgLogReader(pool), {ONE: 0, TWO: 16})
    await replay.run()
    assert ([1, 2, 3], [3]) == (recorder.versions(ONE), recorder.versions(TWO))
    assert (4, {ONE, TWO}, []) == (replay.sent, set(recorder.joined), list(replay))


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
async def test_the_chunk_size_does_not_change_what_is_sent(pool: Pool, chunk: int) -> None:
    hub, recorder = await a_hub(pool), Recorder()
    await a_replay(hub, recorder, PgLogReader(pool), {ONE: 0, TWO: 8, THREE: 24}, limit=chunk).run()
    assert ([1, 2, 3], [2, 3], []) == tuple(map(recorder.versions, (ONE, TWO, THREE)))
    for topic, since in ((ONE, 0), (TWO, 8)):
        frames = [frame for frame in recorder.frames if frame["topic"] == topic]
        positions = [f"{hub.position.epoch}:{since}", *(frame["pos"] for frame in frames)]
        assert positions[:-1] == [frame["prev"] for frame in frames]


class SpendingRecorder(Recorder):
    """Its user has used up its share for a moment."""

    def __init__(self, *, has_credit: bool) -> None:
        super().__init__()
        self.spent = self.on_credit = 0.0
        self._has_credit = has_credit

    def spend(self, seconds: float) -> None:
        self.spent += seconds

    def lend(self, seconds: float) -> None:
        self.on_credit += seconds

    def has_credit(self) -> bool:
        return self._has_credit

    def delay(self) -> float:
        return 0.001


class CrowdedLog(PgLogReader):
    """The real log. It knows how much was asked for, and by how many at once."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.limits: list[int] = []
        self.reading = self.most = 0

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        self.limits.append(limit)
        self.reading += 1
        self.most = max(self.most, self.reading)
        try:
            return await super().read_topics(topics, after, upto, limit)
        finally:
            self.reading -= 1


@pytest.mark.parametrize(
    ("are_many", "has_credit"), [(True, True), (False, False), (False, True)], ids=["many", "no credit", "few"]
)
async def test_replays_of_one_user_take_turns_and_count_if_they_are_many_or_have_no_credit(
    pool: Pool, are_many: bool, has_credit: bool
) -> None:
    hub, log, turns = await a_hub(pool), CrowdedLog(pool), Turns()
    turns.running = FEW + are_many
    recorders = [SpendingRecorder(has_credit=has_credit) for _ in range(3)]
    take_turns = are_many or not has_credit
    replays = [Replay(one, log, hub, SERVED, discontinuity=hub.discontinuity, turns=turns) for one in recorders]
    for replay in replays:
        replay.add(ONE, Seq(0))
    await asyncio.gather(*(replay.run() for replay in replays))
    assert [[1, 2, 3]] * 3 == [recorder.versions(ONE) for recorder in recorders]
    assert {SMALL_READ if take_turns else 1000} == set(log.limits)
    assert log.most == 1
    for replay, recorder in zip(replays, recorders, strict=True):
        assert (recorder.spent > READ, replay.unpaid > READ) == (take_turns, not take_turns)
        assert replay.unpaid == recorder.on_credit


class SharingRecorder(Recorder):
    """Its user has an account, whose share is used up in a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.accounts = Accounts(Limits(user_burst=0.001))
        self.account = self.accounts.enter("ada")

    def spend(self, seconds: float) -> None:
        self.accounts.charge(self.account, 0, asyncio.get_running_loop().time(), seconds)

    def has_credit(self) -> bool:
        return False

    def delay(self) -> float:
        return self.accounts.delay(self.account, asyncio.get_running_loop().time())


async def test_replays_without_credit_and_frames_of_their_user_go_one_after_the_other(pool: Pool) -> None:
    hub, recorder, happened = await a_hub(pool), SharingRecorder(), list[str]()

    class Log(PgLogReader):
        async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
            assert recorder.delay() > 0  # frames wait until it has been read
            happened.append("read")
            return await super().read_topics(topics, after, upto, limit)

    def take_turn() -> None:
        happened.append("frame")
        recorder.spend(RIGHT)
        if replay:
            recorder.accounts.wait(recorder.account, take_turn)

    replay = a_replay(hub, recorder, Log(pool), {ONE: 0}, limit=1)
    recorder.accounts.wait(recorder.account, take_turn)
    await replay.run()
    assert [1, 2, 3] == recorder.versions(ONE)
    assert 2 * happened.count("frame") >= happened.count("read") > 2


def test_what_takes_turns_counts_more_while_changes_are_delivered_live() -> None:
    turns, weights = Turns(), list[int]()
    for seq in (7, 7, 8, 9, 9):
        turns.begin(Position("e", Seq(seq)))
        weights.append(turns.weight)
    assert [1, 1, LIVE_WEIGHT, LIVE_WEIGHT, 1] == weights


@pytest.mark.parametrize("chunk", [1, 2, 1000])
async def test_a_replay_at_a_gateway_gets_past_what_its_member_leaves_out(pool: Pool, chunk: int) -> None:
    def deliverable(batch: Batch) -> list[Change]:
        return [
            change for change in SERVED.deliverable(batch) if json.loads(change.record or "{}").get("version") != 2
        ]

    hub, recorder = await a_hub(pool), Recorder()
    ask = asking(log_reader=PgLogReader(pool), deliverable=deliverable, position=lambda: hub.position)
    log = RemoteLogReader(ask, lambda: hub.position)
    await a_replay(hub, recorder, log, {ONE: 0, TWO: 8}, limit=chunk).run()
    assert ([1, 3], [3], {ONE, TWO}) == (recorder.versions(ONE), recorder.versions(TWO), set(recorder.joined))


async def test_a_topic_added_while_the_log_is_read_is_replayed_too(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), Recorder(), GatedLog(pool)
    replay = a_replay(hub, recorder, log, {ONE: 0})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.add(TWO, Seq(0))
    log.go.set()
    await replaying
    assert ([1, 2, 3], [1, 2, 3]) == (recorder.versions(ONE), recorder.versions(TWO))


async def test_a_topic_removed_while_the_log_is_read_is_sent_nothing_more(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), Recorder(), GatedLog(pool)
    replay = a_replay(hub, recorder, log, {ONE: 0, TWO: 0})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.discard(TWO)
    log.go.set()
    await replaying
    assert ([1, 2, 3], []) == (recorder.versions(ONE), recorder.versions(TWO))
    assert [ONE] == recorder.joined


async def test_a_topic_added_again_at_another_position_is_replayed_from_there(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), Recorder(), GatedLog(pool)
    replay = a_replay(hub, recorder, log, {ONE: 16})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.discard(ONE)
    replay.add(ONE, Seq(8))
    log.go.set()
    await replaying
    assert [2, 3] == recorder.versions(ONE)


async def test_changes_delivered_while_the_log_is_read_are_neither_lost_nor_repeated(
    pool: Pool, sql: Connection, database: str
) -> None:
    hub, log = await a_hub(pool), GatedLog(pool)
    live: list[bytes] = []

    class Follower:
        user = "ada"
        numbers = Numbers.JSON
        outlet = None

        def deliver(self, frames: bytes) -> None:
            live.append(frames)

        def revoked(self, topic: Topic) -> None:
            """Does not happen here."""

        def discontinued(self) -> None:
            """Does not happen here either."""

        def signal(self, frame: bytes) -> None:
            """Nor does this."""

    follower = Follower()

    class JoiningRecorder(Recorder):
        def join(self, topic: Topic) -> None:
            hub.follow(topic, follower)

    recorder = JoiningRecorder()
    replaying = asyncio.create_task(a_replay(hub, recorder, log, {ONE: 0}).run())
    await log.reading.wait()
    async with leader(database, pool):
        await sql.execute("update app.rows set version = 4 where id = 1")
        await until_numbered(pool)
    [fourth] = await PgLogReader(pool).read(Seq(24), 10)
    hub.publish([fourth], Position(hub.position.epoch, fourth.seq), lambda _: ())
    log.go.set()
    await replaying
    assert ([1, 2, 3, 4], []) == (recorder.versions(ONE), live)
    fifth = Change(Seq(fourth.seq + 1), "1", "", "app", "rows", ONE, Kind.UPDATE, "{}", '{"id":1,"version":5}')
    hub.publish([fifth], Position(hub.position.epoch, fifth.seq), lambda _: ())
    assert [5] == [json.loads(frame)["changes"][0]["record"]["version"] for frame in live]


async def test_a_discontinuity_during_a_replay_resets_its_topics_and_they_join(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), Recorder(), GatedLog(pool)
    replay = a_replay(hub, recorder, log, {ONE: 0, TWO: 8})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    hub.move(Position(hub.position.epoch, Seq(10_000_024)), "crash")
    log.go.set()
    await replaying
    assert [("reset", "crash", ONE), ("reset", "crash", TWO)] == [
        (frame["op"], frame["reason"], frame["topic"]) for frame in recorder.frames
    ]
    assert ([ONE, TWO], []) == (recorder.joined, list(replay))


async def test_a_topic_that_falls_behind_during_a_replay_is_sent_the_rest_and_all_join_together(pool: Pool) -> None:
    hub, log, joined = await a_hub(pool), GatedLog(pool), list[tuple[Topic, Seq]]()

    class JoiningRecorder(Recorder):
        def join(self, topic: Topic) -> None:
            joined.append((topic, hub.position.seq))

    recorder = JoiningRecorder()
    hub.position = Position(hub.position.epoch, Seq(16))
    replay = a_replay(hub, recorder, log, {ONE: 0})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.add(TWO, Seq(16), last_frame=Seq(10))  # delivered live up to 16, and its last frame was at 10
    hub.position = Position(hub.position.epoch, Seq(24))
    log.go.set()
    await replaying
    assert ([1, 2, 3], [3]) == (recorder.versions(ONE), recorder.versions(TWO))
    assert [f"{hub.position.epoch}:10"] == [frame["prev"] for frame in recorder.frames if frame["topic"] == TWO]
    assert [(ONE, 24), (TWO, 24)] == joined
    assert {} == replay._sent_positions


async def test_no_topic_joins_while_another_is_still_behind(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), Recorder(), GatedLog(pool)
    replaying = asyncio.create_task(a_replay(hub, recorder, log, {ONE: 0, TWO: hub.position.seq}).run())
    await log.reading.wait()
    assert [] == recorder.joined
    log.go.set()
    await replaying
    assert [ONE, TWO] == recorder.joined


async def test_a_topic_joins_only_after_the_peer_has_read_what_was_sent(pool: Pool) -> None:
    class FullRecorder(Recorder):
        has_room = asyncio.Event()

        async def drained(self) -> None:
            await self.has_room.wait()

    hub, recorder = await a_hub(pool), FullRecorder()
    replay = a_replay(hub, recorder, PgLogReader(pool), {ONE: hub.position.seq})
    replaying = asyncio.create_task(replay.run())
    await asyncio.sleep(0)
    assert ([], [ONE]) == (recorder.joined, list(replay))
    recorder.has_room.set()
    await replaying
    assert [ONE] == recorder.joined


class SlowRecorder(Recorder):
    """A peer that reads nothing after its first frame until the test sets `has_room`."""

    def __init__(self) -> None:
        super().__init__()
        self.has_room = asyncio.Event()

    async def drained(self) -> None:
        if self.frames:
            await self.has_room.wait()


class CountedLog(PgLogReader):
    """The real log. `second` is set when the second read has begun."""

    reads = 0

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.second = asyncio.Event()

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        self.reads += 1
        if self.reads == 2:
            self.second.set()
        return await super().read_topics(topics, after, upto, limit)


async def test_the_next_chunk_is_read_while_the_peer_reads_one(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), SlowRecorder(), CountedLog(pool)
    replaying = asyncio.create_task(a_replay(hub, recorder, log, {ONE: 0}, limit=1).run())
    await log.second.wait()
    assert [1] == recorder.versions(ONE)
    recorder.has_room.set()
    await replaying
    assert [1, 2, 3] == recorder.versions(ONE)


async def test_what_was_read_ahead_is_dropped_when_a_topic_is_added(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), SlowRecorder(), CountedLog(pool)
    replay = a_replay(hub, recorder, log, {ONE: 0}, limit=1)
    replaying = asyncio.create_task(replay.run())
    await log.second.wait()
    replay.add(TWO, Seq(0))
    recorder.has_room.set()
    await replaying
    assert ([1, 2, 3], [1, 2, 3]) == (recorder.versions(ONE), recorder.versions(TWO))


async def test_what_was_read_ahead_of_a_discontinuity_is_not_sent(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), SlowRecorder(), CountedLog(pool)
    replaying = asyncio.create_task(a_replay(hub, recorder, log, {ONE: 0}, limit=1).run())
    await log.second.wait()
    hub.move(Position(hub.position.epoch, Seq(10_000_024)), "crash")
    recorder.has_room.set()
    await replaying
    assert ([1], "crash", [ONE]) == (recorder.versions(ONE), recorder.frames[-1]["reason"], recorder.joined)


async def test_a_replay_that_stops_reads_nothing_further(pool: Pool) -> None:
    hub, recorder, log = await a_hub(pool), SlowRecorder(), CountedLog(pool)
    replay = a_replay(hub, recorder, log, {ONE: 0}, limit=1)
    replaying = replay.task = asyncio.create_task(replay.run())
    await log.second.wait()
    replay.stop()
    with pytest.raises(asyncio.CancelledError):
        await replaying
    assert ([1], 2) == (recorder.versions(ONE), log.reads)


async def test_a_replay_continues_when_the_log_can_be_read_again(pool: Pool) -> None:
    class BrokenLog(PgLogReader):
        attempts = 0

        async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
            self.attempts += 1
            if self.attempts == 2:
                raise LogUnavailable("a test")
            return await super().read_topics(topics, after, upto, limit)

    hub, recorder, readable = await a_hub(pool), Recorder(), asyncio.Event()
    retrying = RetryingLogReader(BrokenLog(pool), readable.wait)
    replaying = asyncio.create_task(a_replay(hub, recorder, retrying, {ONE: 0}, limit=1).run())
    while [1] != recorder.versions(ONE):
        await asyncio.sleep(0.01)
    assert not replaying.done()
    readable.set()
    await replaying
    assert [1, 2, 3] == recorder.versions(ONE)


class DroppedLog(PgLogReader):
    """The real log, dropped before its first read returns."""

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        await self._pool.execute("update rowcast.segments set log_dropped = true, last_seq = 24 where segment = 0")
        return await super().read_topics(topics, after, upto, limit)


async def test_dropping_the_log_during_a_replay_resets_its_topics_and_they_join(pool: Pool) -> None:
    hub, recorder = await a_hub(pool), Recorder()
    await a_replay(hub, recorder, DroppedLog(pool), {ONE: 0, TWO: 8}).run()
    assert {ONE, TWO} == set(recorder.joined)
    assert [("reset", topic, "retention", f"{hub.position}") for topic in (ONE, TWO)] == [
        (frame["op"], frame["topic"], frame["reason"], frame["pos"]) for frame in recorder.frames
    ]


class LiveFollower:
    """It is live, and counts what is delivered to it."""

    user = "ada"
    numbers = Numbers.JSON
    outlet = None
    delivered = 0

    def deliver(self, frames: bytes) -> None:
        self.delivered += frames.count(b'"seq":')

    def signal(self, frame: bytes) -> None:
        """Does not happen here."""

    def revoked(self, topic: Topic) -> None:
        """Does not happen here."""

    def discontinued(self) -> None:
        """Does not happen here."""


class CountingRecorder(Recorder):
    """It counts the changes that it is sent."""

    changes = 0

    def send(self, payload: bytes) -> None:
        super().send(payload)
        self.changes += payload.count(b'"seq":')


class UnvalidatedCache(LogCache):
    """What it reads has to be validated, as what a database reads."""

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        found = await super().read_topics(topics, after, upto, limit)
        return Batch(found, more=found.more)


@pytest.mark.parametrize("cache_type", [LogCache, UnvalidatedCache], ids=["from memory", "from the database"])
async def test_live_changes_are_delivered_between_the_short_steps_of_a_replay(
    pool: Pool, cache_type: type[LogCache]
) -> None:
    hub = Hub(lambda payload: payload + b"\n", SERVED.with_exact_numbers)
    live = Live(hub, SERVED, cache_type(PgLogReader(pool), 2**20))
    live.move(Position("e", Seq(0)), "epoch")
    seqs = count(1)

    def a_change(topic: Topic = ONE) -> Change:
        seq = next(seqs)
        record = f'{{"id":{seq},"version":1}}'
        return Change(Seq(seq), str(seq), "", "app", "rows", topic, Kind.INSERT, f'{{"id":{seq}}}', record)

    def publish(*changes: Change) -> None:
        live.publish(SERVED.batch_of(hub.position, changes)[0])

    publish(*(a_change() for _ in range(10 * SLICE)))
    follower, recorder, published, steps = LiveFollower(), CountingRecorder(), 0, list[int]()
    hub.follow(TWO, follower)
    replay = Replay(recorder, live.log_cache, hub, SERVED, discontinuity=hub.discontinuity)
    replay.add(ONE, Seq(0))
    replaying = asyncio.create_task(replay.run())
    while not replaying.done():
        before = recorder.changes
        await asyncio.sleep(0)
        steps.append(recorder.changes - before)
        if recorder.changes < 10 * SLICE:
            publish(a_change(TWO))
            published += 1
            assert published == follower.delivered
    assert (10 * SLICE, SLICE, [ONE]) == (recorder.changes, max(steps), recorder.joined)
    assert published >= 9


async def test_nobody_waits_for_a_number_of_a_history_that_has_ended(pool: Pool) -> None:
    live = Live(Hub(lambda payload: payload, SERVED.with_exact_numbers), SERVED, LogCache(PgLogReader(pool), 0))
    live.move(Position("e", Seq(0)), "epoch")
    waiting = asyncio.create_task(live.wait_until_delivered(Seq(9)))
    await asyncio.sleep(0)
    live.move(Position("e", Seq(5)), "crash")
    await asyncio.sleep(0)
    assert not waiting.done()
    live.move(Position("f", Seq(3)), "epoch")
    async with asyncio.timeout(10):
        await waiting
