"""From a client's position to the head, over a real log whose reads the test holds up."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from typing import Any

import pytest

from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Hub
from daemon.core.ports import Batch
from daemon.delivery.replay import Replay, ReplayReader, RetryingLogReader
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Connection, Pool, connect
from tests.delivery.versions import ONE, SERVED, THREE, TWO, GatedLog, a_hub, versions
from tests.support.log import leader, until_numbered
from tests.support.postgres import Server


class Reader:
    """A ReplayTarget that keeps what it is sent, and which topics have joined."""

    def __init__(self) -> None:
        self.frames: list[dict[str, Any]] = []
        self.joined: list[Topic] = []

    async def readable_topics(self) -> dict[Topic, Seq]:
        return {}

    def join(self, topic: Topic) -> None:
        self.joined.append(topic)

    def send(self, payload: bytes) -> None:
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


def a_replay(hub: Hub, reader: Reader, log: ReplayReader, places: dict[Topic, int], *, limit: int = 1000) -> Replay:
    """A replay of these topics, each from its place."""
    replay = Replay(reader, log, hub, SERVED, limit=limit, discontinuity=hub.discontinuity)
    for topic, place in places.items():
        replay.add(topic, Seq(place))
    return replay


async def test_missed_changes_are_sent_in_order_and_then_the_topic_joins(pool: Pool) -> None:
    hub, reader = await a_hub(pool), Reader()
    replay = a_replay(hub, reader, PgLogReader(pool), {ONE: 0, TWO: 16})
    await replay.run()
    assert ([1, 2, 3], [3]) == (reader.versions(ONE), reader.versions(TWO))
    assert (4, {ONE, TWO}, []) == (replay.sent, set(reader.joined), list(replay))


@pytest.mark.parametrize("chunk", [1, 2, 5, 1000])
async def test_the_size_of_a_chunk_changes_nothing_that_is_sent(pool: Pool, chunk: int) -> None:
    hub, reader = await a_hub(pool), Reader()
    await a_replay(hub, reader, PgLogReader(pool), {ONE: 0, TWO: 8, THREE: 24}, limit=chunk).run()
    assert ([1, 2, 3], [2, 3], []) == tuple(map(reader.versions, (ONE, TWO, THREE)))
    for topic, since in ((ONE, 0), (TWO, 8)):
        frames = [frame for frame in reader.frames if frame["topic"] == topic]
        places = [f"{hub.position.epoch}:{since}", *(frame["pos"] for frame in frames)]
        assert places[:-1] == [frame["prev"] for frame in frames]


async def test_a_topic_added_while_the_log_is_read_is_replayed_too(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    replay = a_replay(hub, reader, log, {ONE: 0})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.add(TWO, Seq(0))
    log.go.set()
    await replaying
    assert ([1, 2, 3], [1, 2, 3]) == (reader.versions(ONE), reader.versions(TWO))


async def test_a_topic_removed_while_the_log_is_read_is_sent_nothing_more(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    replay = a_replay(hub, reader, log, {ONE: 0, TWO: 0})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.discard(TWO)
    log.go.set()
    await replaying
    assert ([1, 2, 3], []) == (reader.versions(ONE), reader.versions(TWO))
    assert [ONE] == reader.joined


async def test_a_topic_added_again_at_another_position_is_replayed_from_there(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    replay = a_replay(hub, reader, log, {ONE: 16})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.discard(ONE)
    replay.add(ONE, Seq(8))
    log.go.set()
    await replaying
    assert [2, 3] == reader.versions(ONE)


async def test_what_the_hub_delivers_while_the_log_is_read_is_neither_lost_nor_repeated(
    pool: Pool, sql: Connection, database: str
) -> None:
    hub, log = await a_hub(pool), GatedLog(pool)
    live: list[bytes] = []

    class Follower:
        user = "ada"

        def deliver(self, frames: bytes) -> None:
            live.append(frames)

        def revoked(self, topic: Topic) -> None:
            """Not here."""

        def discontinued(self) -> None:
            """Neither."""

    follower = Follower()

    class JoiningReader(Reader):
        def join(self, topic: Topic) -> None:
            hub.follow(topic, follower)

    reader = JoiningReader()
    replaying = asyncio.create_task(a_replay(hub, reader, log, {ONE: 0}).run())
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
    replay = a_replay(hub, reader, log, {ONE: 0, TWO: 8})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    hub.move(Position(hub.position.epoch, Seq(10_000_024)), "crash")
    log.go.set()
    await replaying
    assert [("reset", "crash", ONE), ("reset", "crash", TWO)] == [
        (frame["op"], frame["reason"], frame["topic"]) for frame in reader.frames
    ]
    assert ([ONE, TWO], []) == (reader.joined, list(replay))


async def test_a_topic_that_falls_behind_during_a_replay_is_sent_the_rest_and_all_join_together(pool: Pool) -> None:
    hub, log, joined = await a_hub(pool), GatedLog(pool), list[tuple[Topic, Seq]]()

    class JoiningReader(Reader):
        def join(self, topic: Topic) -> None:
            joined.append((topic, hub.position.seq))

    reader = JoiningReader()
    hub.position = Position(hub.position.epoch, Seq(16))
    replay = a_replay(hub, reader, log, {ONE: 0})
    replaying = asyncio.create_task(replay.run())
    await log.reading.wait()
    replay.add(TWO, Seq(16), last_frame=Seq(10))  # delivered live up to 16, and its last frame was at 10
    hub.position = Position(hub.position.epoch, Seq(24))
    log.go.set()
    await replaying
    assert ([1, 2, 3], [3]) == (reader.versions(ONE), reader.versions(TWO))
    assert [f"{hub.position.epoch}:10"] == [frame["prev"] for frame in reader.frames if frame["topic"] == TWO]
    assert [(ONE, 24), (TWO, 24)] == joined
    assert {} == replay._sent_positions


async def test_no_topic_joins_while_another_is_still_behind(pool: Pool) -> None:
    hub, reader, log = await a_hub(pool), Reader(), GatedLog(pool)
    replaying = asyncio.create_task(a_replay(hub, reader, log, {ONE: 0, TWO: hub.position.seq}).run())
    await log.reading.wait()
    assert [] == reader.joined
    log.go.set()
    await replaying
    assert [ONE, TWO] == reader.joined


async def test_nobody_joins_before_the_peer_has_taken_what_was_sent(pool: Pool) -> None:
    class FullReader(Reader):
        room = asyncio.Event()

        async def drained(self) -> None:
            await self.room.wait()

    hub, reader = await a_hub(pool), FullReader()
    replay = a_replay(hub, reader, PgLogReader(pool), {ONE: hub.position.seq})
    replaying = asyncio.create_task(replay.run())
    await asyncio.sleep(0)
    assert ([], [ONE]) == (reader.joined, list(replay))
    reader.room.set()
    await replaying
    assert [ONE] == reader.joined


async def test_a_replay_outlives_a_log_that_cannot_be_read_for_a_while(pool: Pool) -> None:
    class BrokenLog(PgLogReader):
        attempts = 0

        async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
            self.attempts += 1
            if self.attempts == 2:
                raise LogUnavailable("a test")
            return await super().read_topics(topics, after, upto, limit)

    hub, reader, readable = await a_hub(pool), Reader(), asyncio.Event()
    retrying = RetryingLogReader(BrokenLog(pool), readable.wait)
    replaying = asyncio.create_task(a_replay(hub, reader, retrying, {ONE: 0}, limit=1).run())
    while [1] != reader.versions(ONE):
        await asyncio.sleep(0.01)
    assert not replaying.done()
    readable.set()
    await replaying
    assert [1, 2, 3] == reader.versions(ONE)


class ForgettingLog(PgLogReader):
    """The real log, of which everything is dropped before the first answer."""

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        await self._pool.execute("update rowcast.segments set log_dropped = true, last_seq = 24 where segment = 0")
        return await super().read_topics(topics, after, upto, limit)


async def test_a_replay_whose_log_is_dropped_under_it_is_a_reset_and_goes_on_live(pool: Pool) -> None:
    hub, reader = await a_hub(pool), Reader()
    await a_replay(hub, reader, ForgettingLog(pool), {ONE: 0, TWO: 8}).run()
    assert {ONE, TWO} == set(reader.joined)
    assert [("reset", topic, "retention", f"{hub.position}") for topic in (ONE, TWO)] == [
        (frame["op"], frame["topic"], frame["reason"], frame["pos"]) for frame in reader.frames
    ]
