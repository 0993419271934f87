"""A snapshot and the stream behind it, on a real Postgres in which a test says when events get their numbers."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from daemon.core.change import Numbers, Position, Seq, Topic
from daemon.core.errors import SnapshotTooLarge
from daemon.core.filters import View
from daemon.core.hub import Hub
from daemon.core.snapshot import Rows, Visible, Wanted
from daemon.delivery import snapshots as delivery_snapshots
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.replay import Replay
from daemon.delivery.snapshots import Snapshot, Snapshots
from daemon.log import rows as log_rows
from daemon.log.reader import PgLogReader
from daemon.log.rows import PgRowReader
from daemon.packs import Pack, Row
from daemon.postgres.connect import Connection, Pool, connect
from tests.support.log import ManualLeader

NOTES = """
create schema app;
create table app.notes (id integer primary key, room text not null, body text not null, deleted_at timestamptz);
create index notes_room on app.notes (room);
select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id,body}', soft_delete => 'deleted_at', rows => 'true');
insert into app.notes select n, 'a', 'old', null from generate_series(1, 5) as n;
insert into app.notes values (6, 'b', 'elsewhere');
"""


class Note(Row):
    id: int
    body: str


ROUTER = PackRouter({"app": Pack("app", {"notes": Note}, (r"room:\w+",))})
ROOM = Topic("room:a")
WANTED = Wanted(ROOM, None)


class Peer:
    """A ReplayTarget: what it is sent makes up its rows. A change that these contain already is a fault."""

    numbers = Numbers.JSON

    def __init__(self) -> None:
        self.rows: dict[int, str] = {}
        self.sent: list[tuple[str, int, str | None]] = []
        self.faults: list[str] = []
        self.joined = False

    async def readable_topics(self) -> dict[Topic, Seq]:
        return {}

    def view(self, topic: Topic) -> View | None:
        return None

    def join(self, topic: Topic) -> None:
        self.joined = True

    def too_slow(self, topic: Topic) -> None:
        self.faults.append("too slow")

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

    def send(self, payload: bytes) -> None:
        self.send_encoded(payload)

    def send_encoded(self, frame: bytes) -> None:
        found = json.loads(frame)
        for row in found.get("rows", ()):
            self.rows[row["key"]["id"]] = row["record"]["body"]
        for change in found.get("changes", ()):
            key, body = change["key"]["id"], change.get("record", {}).get("body")
            if self.rows.get(key) == body:
                self.faults.append(f"sent twice: {key} is {body}")
            self.sent.append((change["kind"], key, body))
            if body is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = body


class Reader(PgRowReader):
    """Runs `between` when it knows where the log stands, before it reads rows; then it sets `waiting`."""

    between: Callable[[], Any] | None = None

    def __init__(self, pool: Pool, most: int = 100, size: int = 10**6) -> None:
        super().__init__(pool, ROUTER.schema_of, most, size)
        self.waiting = asyncio.Event()
        self.reads = 0

    async def _rows(self, connection: Connection, schema: str, wanted: Wanted) -> Any:
        self.reads += 1
        if self.between is not None:
            await self.between()
        return await super()._rows(connection, schema, wanted)

    async def _numbered_upto(self, visible: str) -> Seq:
        self.waiting.set()
        return await super()._numbered_upto(visible)


class Log:
    """A log with a leader that numbers when it is told to, and the hub that follows it."""

    def __init__(self, sql: Connection, pool: Pool, leader: ManualLeader) -> None:
        self.sql, self.pool, self._leader = sql, pool, leader
        self.hub = Hub(lambda payload: payload, ROUTER.with_exact_numbers)
        self.reader = Reader(pool)
        self.snapshots = self.over(self.reader)

    def over(self, reader: Reader) -> Snapshots:
        return Snapshots(reader, self.hub, ROUTER, lambda payload: payload, self.deliver)

    async def begin(self) -> None:
        await self._leader.lead()
        await self._leader.number()
        head = await PgLogReader(self.pool).head()
        self.hub.move(head, "epoch")

    async def number(self) -> None:
        assert await self._leader.number()

    async def deliver(self, seq: Seq) -> None:
        """Deliver what is numbered, which is at least this much."""
        batch = await PgLogReader(self.pool).read(self.hub.position.seq, 1000)
        if batch:
            self.hub.publish(batch, Position(self.hub.position.epoch, batch[-1].seq), lambda _: ())
        assert self.hub.position.seq >= seq

    async def follow(self, snapshot: Snapshot) -> Peer:
        """What a client gets that begins with this snapshot."""
        await self.deliver(Seq(0))
        peer = Peer()
        replay = Replay(peer, PgLogReader(self.pool), self.hub, ROUTER, discontinuity=snapshot.discontinuity)
        replay.add_snapshot(ROOM, snapshot, asyncio.get_running_loop().time() + 60)
        await replay.run()
        assert peer.joined
        return peer

    async def table(self) -> dict[int, str]:
        rows = await self.sql.fetch("select id, body from app.notes where room = 'a' and deleted_at is null")
        return {row["id"]: row["body"] for row in rows}


@pytest.fixture
async def log(database: str, sql: Connection, pool: Pool) -> AsyncIterator[Log]:
    await sql.execute(NOTES)
    leading = await connect(database, application_name="leader")
    log = Log(sql, pool, ManualLeader(leading))
    await log.begin()
    yield log
    await leading.close()


async def join_while_everything_happens(log: Log, late: Connection) -> Peer:
    """Take a snapshot among transactions that it shows, and others that it does not, all of them without numbers."""
    transaction = late.transaction()
    await transaction.start()
    await late.execute("insert into app.notes values (20, 'a', 'late')")
    await log.sql.execute("update app.notes set body = 'seen' where id = 1")
    await log.sql.execute("insert into app.notes values (10, 'a', 'seen')")
    await log.sql.execute("update app.notes set deleted_at = now() where id = 2")
    await log.sql.execute("update app.notes set room = 'b' where id = 3")
    await log.sql.execute("delete from app.notes where id = 4")

    async def between() -> None:
        await log.sql.execute("update app.notes set body = 'after' where id = 5")

    log.reader.between = between
    taking = asyncio.create_task(log.snapshots.take(WANTED, Numbers.JSON, Seq(0)))
    await log.reader.waiting.wait()
    await transaction.commit()
    await log.sql.execute("update app.notes set body = 'last', room = 'a' where id = 3")
    await log.number()
    return await log.follow(await taking)


async def verdict(log: Log, peer: Peer) -> list[str]:
    wrong = [] if peer.rows == await log.table() else [f"{peer.rows} is not {await log.table()}"]
    return peer.faults + wrong


@pytest.fixture
async def late(database: str) -> AsyncIterator[Connection]:
    connection = await connect(database, application_name="late")
    yield connection
    await connection.close()


async def test_changes_that_a_snapshot_shows_are_left_out_and_all_others_are_sent(log: Log, late: Connection) -> None:
    peer = await join_while_everything_happens(log, late)
    assert [] == await verdict(log, peer)
    assert {("insert", 20, "late"), ("update", 5, "after"), ("insert", 3, "last")} == set(peer.sent)


def without_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replay, "_is_contained", lambda *_: False)


def with_too_short_a_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery_snapshots, "Snapshot", lambda *a: replace(Snapshot(*a), upto=a[0].seq))


def with_a_filter_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Visible, "shows", lambda *_: True)


def with_a_filter_by_xmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Visible, "shows", lambda self, change: int(change.tx) < self.xmax)


def with_a_later_position(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        delivery_snapshots, "Snapshot", lambda *a: replace(Snapshot(*a), position=a[0]._replace(seq=a[2]))
    )


def with_a_snapshot_for_each_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_rows, "ISOLATION", "read_committed")


@pytest.mark.parametrize(
    "weaken",
    [
        without_filter,
        with_too_short_a_filter,
        with_a_filter_by_number,
        with_a_filter_by_xmax,
        with_a_later_position,
        with_a_snapshot_for_each_statement,
    ],
)
async def test_a_join_without_one_of_its_rules_sends_rows_twice_or_not_at_all(
    log: Log, late: Connection, monkeypatch: pytest.MonkeyPatch, weaken: Callable[[pytest.MonkeyPatch], None]
) -> None:
    weaken(monkeypatch)
    peer = await join_while_everything_happens(log, late)
    assert [] != await verdict(log, peer)


@pytest.mark.parametrize(
    ("condition", "instead"),
    [(".deleted_at is null", ".id is not null"), ('$1 collate "C" = any', 'true or $1 collate "C" = any')],
)
async def test_a_snapshot_function_without_one_of_its_conditions_shows_rows_that_are_not_there(
    log: Log, late: Connection, condition: str, instead: str
) -> None:
    name = await log.sql.fetchval("select snapshot_name from rowcast.watched where table_name = 'notes'")
    text = await log.sql.fetchval("select pg_get_functiondef($1::regproc)", f"rowcast.{name}")
    assert condition in text
    await log.sql.execute(text.replace(condition, instead))
    peer = await join_while_everything_happens(log, late)
    assert [] != await verdict(log, peer)


async def test_a_crowd_shares_one_read_and_a_right_that_began_later_gets_another(log: Log) -> None:
    crowd = [log.snapshots.take(WANTED, Numbers.JSON, Seq(0)) for _ in range(300)]
    first, *others = await asyncio.gather(*crowd)
    assert 1 == log.reader.reads
    assert all(snapshot is first for snapshot in others)
    await log.sql.execute("update app.notes set body = 'granted' where id = 1")
    await log.number()
    await log.deliver(Seq(0))
    newer = await log.snapshots.take(WANTED, Numbers.JSON, log.hub.position.seq)
    assert 2 == log.reader.reads
    assert log.hub.position == newer.position
    assert newer is await log.snapshots.take(WANTED, Numbers.JSON, log.hub.position.seq)


async def test_a_snapshot_does_not_wait_for_filters_that_look_through_many_rows(log: Log) -> None:
    class Slow(Reader):
        async def read(self, wanted: Wanted) -> Any:
            if wanted.view is not None:
                await asyncio.Event().wait()
            return await super().read(wanted)

    snapshots = log.over(Slow(log.pool))
    slow = [
        asyncio.create_task(snapshots.take(Wanted(ROOM, None, View({}, {}, name)), Numbers.JSON, Seq(0)))
        for name in "abc"
    ]
    await asyncio.sleep(0)
    assert (await asyncio.wait_for(snapshots.take(WANTED, Numbers.JSON, Seq(0)), 30)).frames
    for task in slow:
        task.cancel()


async def test_a_snapshot_from_before_a_discontinuity_is_read_again(log: Log) -> None:
    first = await log.snapshots.take(WANTED, Numbers.JSON, Seq(0))
    log.hub.move(log.hub.position, "crash")
    second = await log.snapshots.take(WANTED, Numbers.JSON, Seq(0))
    assert first is not second
    assert log.hub.discontinuity is second.discontinuity


async def test_a_topic_beyond_the_limits_is_refused_and_some_of_its_rows_are_not(log: Log) -> None:
    for reader in (Reader(log.pool, 4), Reader(log.pool, 100, 50)):
        snapshots = log.over(reader)
        with pytest.raises(SnapshotTooLarge):
            await snapshots.take(WANTED, Numbers.JSON, Seq(0))
    snapshot = await log.over(Reader(log.pool, 4)).take(Wanted(ROOM, 2), Numbers.JSON, Seq(0))
    assert {4: "old", 5: "old"} == (await log.follow(snapshot)).rows
    assert {*range(1, 6)} == {
        *(await log.follow(await log.over(Reader(log.pool, 5)).take(WANTED, Numbers.JSON, Seq(0)))).rows
    }


async def test_rows_that_do_not_fit_are_counted_and_pages_are_small(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery_snapshots, "MAX_PAGE", 60)
    rows: Rows = await log.reader.read(WANTED)
    broken = [row._replace(record="{}") if place == 2 else row for place, row in enumerate(rows.rows)]

    class Broken(Reader):
        async def read(self, wanted: Wanted) -> Rows:
            return replace(rows, rows=broken, omitted={"notes": 1})

    snapshot = await log.over(Broken(log.pool)).take(WANTED, Numbers.JSON, Seq(0))
    frames = [json.loads(frame) for frame in snapshot.frames or ()]
    assert [2, 2] == [len(frame["rows"]) for frame in frames]
    assert [True, False] == [frame["more"] for frame in frames]
    assert [2, None] == [frame.get("omitted") for frame in frames]


async def test_the_oldest_snapshot_gives_way_and_those_who_still_read_it_learn_that(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = Snapshots(log.reader, log.hub, ROUTER, lambda payload: payload, log.deliver, max_bytes=500)
    first, second = [await snapshots.take(Wanted(ROOM, limit), Numbers.JSON, Seq(0)) for limit in (4, 5)]
    assert (None, 5) == (first.frames, len((await log.follow(second)).rows))
    assert ["too slow"] == await unjoined(log, first)
    newer = await snapshots.take(Wanted(ROOM, 4), Numbers.JSON, Seq(0))
    assert 4 == len((await log.follow(newer)).rows)


async def test_a_snapshot_that_is_not_read_in_time_ends(log: Log) -> None:
    snapshot = await log.snapshots.take(WANTED, Numbers.JSON, Seq(0))
    assert ["too slow"] == await unjoined(log, snapshot, seconds=-1)


async def unjoined(log: Log, snapshot: Snapshot, seconds: float = 60) -> list[str]:
    """The faults of a client that does not get this snapshot, and so never joins the stream."""
    peer = Peer()
    replay = Replay(peer, PgLogReader(log.pool), log.hub, ROUTER, discontinuity=snapshot.discontinuity)
    replay.add_snapshot(ROOM, snapshot, asyncio.get_running_loop().time() + seconds)
    await replay.run()
    assert (False, {}) == (peer.joined, peer.rows)
    return peer.faults
