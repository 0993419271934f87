"""From a client's position to the head, over a real log whose reads the test holds up."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import pytest

from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Hub
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.replay import RetryingLogReader, replay
from daemon.log.reader import PgLogReader
from daemon.packs import Pack, Row
from daemon.postgres.connect import Connection, Pool, open_pool
from tests.support.log import ROWS, leader, until_numbered


class Version(Row):
    id: int
    version: int


SERVED = PackRouter({"app": Pack("app", {"rows": Version}, (r"row:\d+",))})
ONE, TWO, THREE = (Topic(f"row:{number}") for number in (1, 2, 3))


class GatedLog(PgLogReader):
    """The real log; each read waits, before it answers, until the test lets it go."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.reading = asyncio.Event()
        self.go = asyncio.Event()

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Sequence[Change]:
        found = await super().read_topics(topics, after, upto, limit)
        self.reading.set()
        await self.go.wait()
        return found


class Reader:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []

    async def look_up_rights(self) -> dict[Topic, Seq]:
        return {}

    def tell(self, payload: bytes) -> None:
        self.frames.append(json.loads(payload))

    async def drained(self) -> None:
        """At once."""

    def versions(self, topic: Topic) -> list[int]:
        return [
            change["record"]["version"]
            for frame in self.frames
            if frame["op"] == "changes" and frame["topic"] == topic
            for change in frame["changes"]
        ]


@pytest.fixture
async def pool(database: str, sql: Connection) -> AsyncIterator[Pool]:
    """A log in which each of eight rows has the versions 1 to 3, in transactions of their own."""
    await sql.execute(ROWS)
    pool = await open_pool(database, application_name="test", max_size=5)
    async with leader(database, pool):
        for version in (1, 2, 3):
            await sql.execute("update app.rows set version = $1", version)
        await until_numbered(pool)
    yield pool
    await pool.close()


async def a_hub(pool: Pool) -> Hub:
    """A hub at the head; its frames are lines."""
    hub = Hub(encode=lambda payload: payload + b"\n")
    head = await PgLogReader(pool).head()
    hub.move(Position(head.epoch, Seq(24)), "epoch")
    return hub


async def test_what_was_missed_is_told_in_order_and_then_the_topic_joins(pool: Pool) -> None:
    hub, reader, joined = await a_hub(pool), Reader(), list[Topic]()
    behind = {ONE: Seq(0), TWO: Seq(16)}
    sent = await replay(behind, reader, joined.append, log_reader=PgLogReader(pool), hub=hub, router=SERVED)
    assert ([1, 2, 3], [3]) == (reader.versions(ONE), reader.versions(TWO))
    assert (4, {ONE, TWO}, {}) == (sent, set(joined), behind)


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
async def test_the_size_of_a_chunk_changes_nothing_that_is_told(pool: Pool, chunk: int) -> None:
    hub, reader = await a_hub(pool), Reader()
    behind = {ONE: Seq(0), TWO: Seq(8), THREE: Seq(24)}
    await replay(behind, reader, lambda _: None, log_reader=PgLogReader(pool), hub=hub, router=SERVED, chunk=chunk)
    assert ([1, 2, 3], [2, 3], []) == tuple(map(reader.versions, (ONE, TWO, THREE)))
    for topic, since in ((ONE, 0), (TWO, 8)):
        frames = [frame for frame in reader.frames if frame["topic"] == topic]
        places = [f"{hub.position.epoch}:{since}", *(frame["pos"] for frame in frames)]
        assert places[:-1] == [frame["prev"] for frame in frames]


async def test_a_topic_that_comes_while_the_log_is_read_is_told_everything_too(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    behind = {ONE: Seq(0)}
    replaying = asyncio.create_task(replay(behind, reader, lambda _: None, log_reader=log, hub=hub, router=SERVED))
    await log.reading.wait()
    behind[TWO] = Seq(0)
    log.go.set()
    await replaying
    assert ([1, 2, 3], [1, 2, 3]) == (reader.versions(ONE), reader.versions(TWO))


async def test_a_topic_that_goes_while_the_log_is_read_is_told_nothing_more(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    behind, joined = {ONE: Seq(0), TWO: Seq(0)}, list[Topic]()
    replaying = asyncio.create_task(replay(behind, reader, joined.append, log_reader=log, hub=hub, router=SERVED))
    await log.reading.wait()
    del behind[TWO]
    log.go.set()
    await replaying
    assert ([1, 2, 3], []) == (reader.versions(ONE), reader.versions(TWO))
    assert [ONE] == joined


async def test_a_topic_left_and_asked_for_again_from_elsewhere_is_told_from_there(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    behind = {ONE: Seq(16)}
    replaying = asyncio.create_task(replay(behind, reader, lambda _: None, log_reader=log, hub=hub, router=SERVED))
    await log.reading.wait()
    del behind[ONE]
    behind[ONE] = Seq(8)
    log.go.set()
    await replaying
    assert [2, 3] == reader.versions(ONE)


async def test_what_the_hub_delivers_while_the_log_is_read_is_neither_lost_nor_repeated(
    pool: Pool, sql: Connection, database: str
) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    live: list[bytes] = []

    class Follower:
        user = "ada"

        def deliver(self, frames: bytes) -> None:
            live.append(frames)

        def revoked(self, topic: Topic) -> None:
            """Not here."""

        def moved(self) -> None:
            """Neither."""

    follower = Follower()
    replaying = asyncio.create_task(
        replay(
            {ONE: Seq(0)},
            reader,
            lambda topic: hub.follow(topic, follower),
            log_reader=log,
            hub=hub,
            router=SERVED,
        )
    )
    await log.reading.wait()
    async with leader(database, pool):
        await sql.execute("update app.rows set version = 4 where id = 1")
        await until_numbered(pool)
    [fourth] = await PgLogReader(pool).read(Seq(24), 10)
    hub.publish([fourth], Position(hub.position.epoch, fourth.seq), lambda _: ())
    log.go.set()
    await replaying
    assert ([1, 2, 3, 4], []) == (reader.versions(ONE), live)
    fifth = Change(Seq(fourth.seq + 1), "1", "", "app", "rows", ONE, Kind.UPDATE, "{}", '{"id":1,"version":5}')
    hub.publish([fifth], Position(hub.position.epoch, fifth.seq), lambda _: ())
    assert [5] == [json.loads(frame)["changes"][0]["record"]["version"] for frame in live]


async def test_who_is_on_the_way_when_numbers_were_lost_is_reset_and_joins(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    behind, joined = {ONE: Seq(0), TWO: Seq(8)}, list[Topic]()
    replaying = asyncio.create_task(replay(behind, reader, joined.append, log_reader=log, hub=hub, router=SERVED))
    await log.reading.wait()
    hub.move(Position(hub.position.epoch, Seq(10_000_024)), "crash")
    log.go.set()
    await replaying
    assert [("reset", "crash", ONE), ("reset", "crash", TWO)] == [
        (frame["op"], frame["reason"], frame["topic"]) for frame in reader.frames
    ]
    assert ([ONE, TWO], {}) == (joined, behind)


async def test_a_topic_that_falls_behind_during_a_replay_is_told_the_rest_and_all_join_together(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    hub.position = Position(hub.position.epoch, Seq(16))
    behind, told, joined = {ONE: Seq(0)}, dict[Topic, Seq](), list[tuple[Topic, Seq]]()
    replaying = asyncio.create_task(
        replay(
            behind,
            reader,
            lambda topic: joined.append((topic, hub.position.seq)),
            log_reader=log,
            hub=hub,
            router=SERVED,
            told=told,
        )
    )
    await log.reading.wait()
    behind[TWO], told[TWO] = Seq(16), Seq(10)  # told live up to 16, and its last frame was at 10
    hub.position = Position(hub.position.epoch, Seq(24))
    log.go.set()
    await replaying
    assert ([1, 2, 3], [3]) == (reader.versions(ONE), reader.versions(TWO))
    assert [f"{hub.position.epoch}:10"] == [frame["prev"] for frame in reader.frames if frame["topic"] == TWO]
    assert [(ONE, 24), (TWO, 24)] == joined
    assert {} == told


async def test_no_topic_joins_while_another_has_still_something_to_hear(pool: Pool) -> None:
    hub, reader, log, joined = await a_hub(pool), Reader(), GatedLog(pool), list[Topic]()
    behind = {ONE: Seq(0), TWO: hub.position.seq}
    replaying = asyncio.create_task(replay(behind, reader, joined.append, log_reader=log, hub=hub, router=SERVED))
    await log.reading.wait()
    assert [] == joined
    log.go.set()
    await replaying
    assert [ONE, TWO] == joined


async def test_nobody_joins_before_the_peer_has_taken_what_was_sent(pool: Pool) -> None:
    class FullReader(Reader):
        room = asyncio.Event()

        async def drained(self) -> None:
            await self.room.wait()

    hub, reader, joined = await a_hub(pool), FullReader(), list[Topic]()
    behind = {ONE: hub.position.seq}
    replaying = asyncio.create_task(
        replay(behind, reader, joined.append, log_reader=PgLogReader(pool), hub=hub, router=SERVED)
    )
    await asyncio.sleep(0)
    assert ([], {ONE}) == (joined, set(behind))
    reader.room.set()
    await replaying
    assert [ONE] == joined


async def test_a_replay_outlives_a_log_that_cannot_be_read_for_a_while(pool: Pool) -> None:
    class BrokenLog(PgLogReader):
        attempts = 0

        async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Sequence[Change]:
            self.attempts += 1
            if self.attempts == 2:
                raise LogUnavailable("a test")
            return await super().read_topics(topics, after, upto, limit)

    hub, reader, readable = await a_hub(pool), Reader(), asyncio.Event()
    history = RetryingLogReader(BrokenLog(pool), readable.wait)
    replaying = asyncio.create_task(
        replay({ONE: Seq(0)}, reader, lambda _: None, log_reader=history, hub=hub, router=SERVED, chunk=1)
    )
    while [1] != reader.versions(ONE):
        await asyncio.sleep(0.01)
    assert not replaying.done()
    readable.set()
    await replaying
    assert [1, 2, 3] == reader.versions(ONE)


class ForgettingLog(PgLogReader):
    """The real log, of which everything is dropped before the first answer."""

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Sequence[Change]:
        await self._pool.execute("update rowcast.segments set log_dropped = true, last_seq = 24 where segment = 0")
        return await super().read_topics(topics, after, upto, limit)


async def test_a_replay_whose_log_is_dropped_under_it_is_a_reset_and_goes_on_live(pool: Pool) -> None:
    hub, reader, joined = await a_hub(pool), Reader(), list[Topic]()
    behind = {ONE: Seq(0), TWO: Seq(8)}
    await replay(behind, reader, joined.append, log_reader=ForgettingLog(pool), hub=hub, router=SERVED)
    assert {ONE, TWO} == set(joined)
    assert [("reset", topic, "retention", f"{hub.position}") for topic in (ONE, TWO)] == [
        (frame["op"], frame["topic"], frame["reason"], frame["pos"]) for frame in reader.frames
    ]
