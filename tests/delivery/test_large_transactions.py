"""Transactions with more changes than the limit: each topic is reset once, and revoked rights still end."""

import asyncio
from collections.abc import AsyncIterator

import asyncpg
import pytest

from daemon.core.change import ALL_TOPICS, Change, Kind, Position, Right, Seq, Topic
from daemon.core.hub import Hub
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.pump import Pump
from daemon.log.dead_letters import DeadLetters
from daemon.log.reader import PgLogReader
from daemon.packs import Pack
from daemon.postgres.connect import Connection, Pool, connect, open_pool
from tests.support.log import ROWS, leader, until_numbered
from tests.support.postgres import Server

MAX_CHANGES = 5
ONE, TWO = Topic("row:1"), Topic("row:2")
ROOMS = """
create schema app;
create table app.rooms (id integer primary key, room text not null, member text);
select rowcast.watch('app.rooms', $$'room:' || r.room$$, '{id,room}',
                     revokes => $$jsonb_build_object('user', r.member, 'topic', 'room:' || r.room)$$);
"""


async def write(database: str, pool: Pool, sql: Connection, *statements: str) -> None:
    """Run each statement in a transaction of its own, and wait until all are numbered."""
    async with leader(database, pool):
        for statement in statements:
            await sql.execute(statement)
        await until_numbered(pool)


def summary(changes: list[Change]) -> list[tuple[int, str, str]]:
    return [(change.seq, change.kind.value, change.topic) for change in changes]


async def everything(log: PgLogReader, limit: int = 1000, after: int = 0) -> list[Change]:
    found: list[Change] = []
    while changes := await log.read(found[-1].seq if found else Seq(after), limit):
        found += changes
    return found


@pytest.fixture(scope="module")
async def written(postgres: Server) -> AsyncIterator[Pool]:
    """Changes 1 and 2 of a small transaction, 3 to 10 of one that is too large, and 11 of another small one."""
    async with postgres.chatgenius() as database:
        pool = await open_pool(database, application_name="test", max_size=5)
        sql = await connect(database, application_name="test")
        await sql.execute(ROWS)
        await write(
            database,
            pool,
            sql,
            "update app.rows set version = 1 where id <= 2",
            f"begin; {'update app.rows set version = version + 1 where id <= 2; ' * 4} commit",
            "update app.rows set version = 10 where id = 1",
        )
        await sql.close()
        yield pool
        await pool.close()


@pytest.fixture
def log(written: Pool) -> PgLogReader:
    return PgLogReader(written, MAX_CHANGES)


SMALL, LARGE, LAST = (
    [(1, "update", ONE), (2, "update", TWO)],
    [(6, "limit", ONE), (10, "limit", TWO)],
    [(11, "update", ONE)],
)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 10, 1000])
async def test_a_too_large_transaction_is_one_change_in_each_topic_that_it_touched(
    log: PgLogReader, limit: int
) -> None:
    changes = await everything(log, limit)
    assert SMALL + LARGE + LAST == summary(changes)
    assert {("{}", None, ())} == {(c.key, c.record, c.changed) for c in changes if c.kind is Kind.LIMIT}
    assert 1 == len({change.tx for change in changes if change.kind is Kind.LIMIT})


async def test_a_transaction_as_large_as_the_limit_is_delivered(log: PgLogReader, written: Pool) -> None:
    assert Kind.LIMIT in {change.kind for change in await everything(PgLogReader(written, 7))}
    assert Kind.LIMIT not in {change.kind for change in await everything(PgLogReader(written, 8))}


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 10, 1000])
async def test_a_read_of_topics_returns_the_same_as_a_read_of_the_log(log: PgLogReader, limit: int) -> None:
    async def of(*topics: Topic) -> list[tuple[int, str, str]]:
        found: list[Change] = []
        while True:
            changes = await log.read_topics(topics, found[-1].seq if found else Seq(0), Seq(11), limit)
            found += changes
            if len(changes) < limit:
                return summary(found)

    assert SMALL + LARGE + LAST == await of(ONE, TWO)
    assert [SMALL[0], LARGE[0], *LAST] == await of(ONE)
    assert [SMALL[1], LARGE[1]] == await of(TWO)


@pytest.mark.parametrize("after", range(2, 11))
async def test_a_read_from_inside_a_too_large_transaction_returns_the_rest_of_it(
    log: PgLogReader, after: int
) -> None:
    rest = [change for change in LARGE + LAST if change[0] > after]
    assert rest == summary(list(await log.read_topics([ONE, TWO], Seq(after), Seq(11), 1000)))


async def test_the_rest_of_a_transaction_is_delivered_if_it_is_not_too_large(log: PgLogReader) -> None:
    assert LARGE + LAST == summary(await everything(log, after=4))
    assert [6, 7, 8, 9, 10, 11] == [change.seq for change in await everything(log, after=5)]


async def test_one_read_of_topics_continues_after_a_too_large_transaction(log: PgLogReader) -> None:
    assert [SMALL[0], LARGE[0], *LAST] == summary(list(await log.read_topics([ONE], Seq(0), Seq(11), 3)))


class CountingLogReader(PgLogReader):
    """The real log reader, which counts the rows that each statement returns."""

    def __init__(self, pool: Pool, transaction_changes: int) -> None:
        super().__init__(pool, transaction_changes)
        self.counts: list[int] = []

    async def _fetch(self, time_limit: float, name: str, *arguments: object) -> list[asyncpg.Record]:
        rows = await super()._fetch(time_limit, name, *arguments)
        self.counts.append(len(rows))
        return rows


async def test_a_too_large_transaction_is_never_fetched_whole(log: PgLogReader, written: Pool) -> None:
    counted = CountingLogReader(written, MAX_CHANGES)
    await everything(counted, limit=3)
    await counted.read_topics([ONE, TWO], Seq(0), Seq(11), 3)
    assert 3 == max(counted.counts)


async def test_changes_after_a_too_large_transaction_need_no_further_wakeup(log: PgLogReader) -> None:
    head = await log.head()
    router, wakeup, log_cache = PackRouter(), asyncio.Event(), LogCache(log, 0)
    hub = Hub(lambda payload: payload, router.with_exact_numbers)
    live = Live(hub, router, log_cache)
    pump = Pump(
        log,
        wakeup,
        live,
        DeadLetters(log._pool).store_dead_letters,
        poll_every=3600,
        chunk=10,
    )
    hub.move(Position(head.epoch, Seq(0)), "epoch")
    log_cache.restart(hub.position)
    pump.started.set()
    pumping = asyncio.create_task(pump.run())
    async with asyncio.timeout(30):
        await live.wait_until_delivered(Seq(11))
    pumping.cancel()
    await asyncio.gather(pumping, return_exceptions=True)


async def test_more_topics_than_the_limit_become_all_topics(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute(ROWS)
    await write(database, pool, sql, "update app.rows set version = 1")
    log = PgLogReader(pool, MAX_CHANGES)
    assert [(8, "limit", ALL_TOPICS)] == summary(await everything(log))
    assert [(2, "limit", TWO)] == summary(list(await log.read_topics([TWO], Seq(0), Seq(8), 1000)))


def ends(changes: list[Change]) -> list[tuple[int, Right]]:
    return [(change.seq, change.ends) for change in changes if change.ends]


async def test_rights_revoked_in_a_too_large_transaction_are_read_with_it(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROOMS)
    await write(
        database,
        pool,
        sql,
        """begin; insert into app.rooms select n, 'a', 'user' || n from generate_series(1, 6) as n;
           delete from app.rooms where id in (2, 4); insert into app.rooms values (9, 'b', 'user9'); commit""",
    )
    changes = await everything(PgLogReader(pool, MAX_CHANGES))
    assert [(7, "limit", "room:a"), (8, "limit", "room:a"), (9, "limit", "room:b")] == summary(changes)
    assert [(7, Right("user2", Topic("room:a"))), (8, Right("user4", Topic("room:a")))] == sorted(
        ends(changes), key=lambda end: end[0]
    )


async def test_all_rights_end_when_one_transaction_ends_too_many(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.log.reader.MAX_ENDED_RIGHTS", 2)
    await sql.execute(ROOMS)
    await write(
        database,
        pool,
        sql,
        """begin; insert into app.rooms select n, 'a', 'user' || n from generate_series(1, 6) as n;
           delete from app.rooms where id <= 3; commit""",
    )
    changes = await everything(PgLogReader(pool, MAX_CHANGES))
    assert [(7, Right(None, None))] == ends(changes)
    assert [(7, "limit", "room:a"), (9, "limit", "room:a")] == summary(changes)


def a_limit(topic: str, schema: str = "app", ends: Right | None = None) -> Change:
    return Change(Seq(7), "1", "", schema, "rows", Topic(topic), Kind.LIMIT, "{}", None, ends=ends)


SERVED = PackRouter({"app": Pack("app", {}, (r"row:\d+",)), "more": Pack("more", {}, (r"more:\d+",))})
FOLLOWED = [ONE, TWO, Topic("more:1")]


@pytest.mark.parametrize(
    ("topic", "covered"),
    [("row:1", [ONE]), ("row:9", []), ("*app", [ONE, TWO]), ("*more", FOLLOWED[2:]), ("*", FOLLOWED)],
)
def test_a_too_large_transaction_resets_only_the_topics_that_it_touched(topic: str, covered: list[Topic]) -> None:
    limit = a_limit(topic)
    assert ([limit], []) == SERVED.validate([limit])
    assert covered == list(SERVED.topics_to_reset(limit, FOLLOWED))


@pytest.mark.parametrize("topic", ["other:1", "*other"])
def test_a_too_large_transaction_in_another_schema_is_ignored(topic: str) -> None:
    assert ([], []) == SERVED.validate([a_limit(topic, "other")])


def test_ending_all_rights_of_one_pack_leaves_those_of_other_packs() -> None:
    every_right = Right(None, None)
    limits = [a_limit("row:1", ends=every_right), a_limit("other:1", "other", every_right)]
    [end] = SERVED.right_ends(SERVED.ended_rights(limits))
    assert (7, every_right) == (end.seq, end.right)
    assert [ONE, TWO] == [topic for topic in (ONE, Topic("other:1"), TWO) if end.serves(topic)]
