"""The contract of the LogReader port: the log in Postgres, the cache in memory over it, and a gateway that asks."""

from collections.abc import AsyncIterator, Collection
from itertools import pairwise

import pytest

from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.ports import LogReader
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pack_router import PackRouter
from daemon.log.reader import PgLogReader
from daemon.packs import Pack, Row
from daemon.postgres.connect import Pool, connect, open_pool
from daemon.relay.remote import RemoteLogReader
from tests.support.log import ROWS, leader, until_numbered
from tests.support.postgres import Server
from tests.support.relay import asking


class Version(Row):
    id: int
    version: int


ROUTER = PackRouter({"app": Pack("app", {"rows": Version}, (r"row:\d+",))})
MAX_TRANSACTION = 20  # changes: a larger transaction is read as `limit`
ALL = [Topic("*app"), *(Topic(f"row:{number}") for number in range(1, 9))]
FIRST_TERM = (
    "update app.rows set version = 1",
    "update app.rows set version = 2 where id <= 3",
    "begin; update app.rows set version = 3 where id <= 2; update app.rows set version = 4 where id <= 2; commit",
    "truncate app.rows",
    "insert into app.rows select n, 5 from generate_series(1, 8) as n",
    f"begin; {'update app.rows set version = version + 1 where id <= 3;' * 7} commit",
    "update app.rows set version = 6 where id in (1, 8)",
)
SECOND_TERM = ("update app.rows set version = 7", "update app.rows set version = 8 where id > 4")


@pytest.fixture(scope="module")
async def pool(postgres: Server) -> AsyncIterator[Pool]:
    """A log of two terms, with a truncated table and a transaction that is too large in the first."""
    async with postgres.chatgenius() as database:
        pool = await open_pool(database, application_name="test", max_size=5)
        sql = await connect(database, application_name="test")
        await sql.execute(ROWS)
        for statements in (FIRST_TERM, SECOND_TERM):
            async with leader(database, pool, killed=True):
                for statement in statements:
                    await sql.execute(statement)
                await until_numbered(pool)
        await sql.close()
        yield pool
        await pool.close()


async def everything(log: LogReader, chunk: int = 1000) -> list[Change]:
    found: list[Change] = []
    while changes := await log.read(found[-1].seq if found else Seq(0), chunk):
        found += changes
    return found


async def fill_cache(inner: LogReader, max_bytes: int, chunk: int) -> LogCache:
    """Fill a cache the way a pump does that started with the log."""
    log_cache = LogCache(inner, max_bytes)
    epoch = (await inner.head()).epoch
    log_cache.restart(Position(epoch, Seq(0)))
    after = Seq(0)
    while changes := await inner.read(after, chunk):
        log_cache.add(ROUTER.batch_of(Position(epoch, after), changes)[0])
        after = changes[-1].seq
    return log_cache


CACHE_SIZES = {"all in memory": 2**20, "some in memory": 15_000, "none in memory": 0}  # bytes


@pytest.fixture(params=["postgres", *CACHE_SIZES, "a gateway"])
async def log(request: pytest.FixtureRequest, pool: Pool) -> LogReader:
    inner = PgLogReader(pool, MAX_TRANSACTION)
    if request.param == "a gateway":
        member = await fill_cache(inner, CACHE_SIZES["some in memory"], chunk=5)
        position = await inner.head()
        ask = asking(log_reader=member, deliverable=ROUTER.deliverable, position=lambda: position)
        remote = RemoteLogReader(ask, lambda: position)
        return await fill_cache(remote, CACHE_SIZES["some in memory"] // 2, chunk=5)
    return inner if request.param == "postgres" else await fill_cache(inner, CACHE_SIZES[request.param], chunk=5)


async def replay(log: LogReader, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> list[Change]:
    """Read all of it in chunks, the way a replay does."""
    found: list[Change] = []
    while True:
        batch = await log.read_topics(topics, after, upto, limit)
        found += ROUTER.deliverable(batch)
        if not batch.more:
            break
        after = batch.reached
    return found


def visible(one: Change) -> tuple[object, ...]:
    """The parts of a change that a client can see."""
    return one.seq, one.topic, one.kind, one.key, one.record, one.changed, one.tx, one.at


async def test_numbers_grow_and_every_read_ends_at_the_end_of_a_transaction(log: LogReader) -> None:
    changes = await everything(log, 3)
    assert all(one.seq < other.seq for one, other in pairwise(changes))
    last_of = {change.tx: change.seq for change in changes}
    after = Seq(0)
    while read := await log.read(after, 3):
        after = read[-1].seq
        assert last_of[read[-1].tx] == after
    assert (await log.head()).seq == after


@pytest.mark.parametrize("limit", [1, 4, 1000])
@pytest.mark.parametrize("topics", [ALL, ALL[:2], ALL[3:], [Topic("row:99")]])
async def test_reading_topics_from_any_position_agrees_with_reading_everything(
    log: LogReader, topics: Collection[Topic], limit: int
) -> None:
    changes = await everything(log)
    upto = changes[-1].seq
    for after in (Seq(0), *(change.seq for change in changes)):
        expected = [visible(change) for change in changes if change.topic in topics and change.seq > after]
        assert expected == [visible(change) for change in await replay(log, topics, after, upto, limit)]


async def test_reading_topics_stops_at_the_requested_position(log: LogReader) -> None:
    changes = await everything(log)
    last_of = {change.tx: change.seq for change in changes}
    for upto in last_of.values():
        expected = [visible(change) for change in changes if change.seq <= upto]
        assert expected == [visible(change) for change in await replay(log, ALL, Seq(0), upto, 1000)]


async def test_a_read_returns_at_least_the_limit_and_whole_transactions(log: LogReader) -> None:
    changes = await everything(log)
    for limit in (1, 2, 5, 20):
        answer = await log.read_topics(ALL, Seq(0), changes[-1].seq, limit)
        assert len(answer) >= limit
        assert answer[-1].seq in {change.seq for change in changes}
        rest = [change for change in changes if change.seq > answer[-1].seq]
        assert answer[-1].tx not in {change.tx for change in rest}


async def test_exactly_the_positions_that_were_read_can_be_continued(log: LogReader) -> None:
    changes = await everything(log)
    head = await log.head()
    base = next(later.seq - 1 for one, later in pairwise(changes) if later.seq > one.seq + 2**17)
    end = max(change.seq for change in changes if change.seq < base)
    on_record = [Seq(0), *(change.seq for change in changes), Seq(base)]
    assert {None} == {await log.continuity(Position(head.epoch, seq)) for seq in on_record}
    for lost in (end + 1, base - 1):
        assert "crash" == await log.continuity(Position(head.epoch, Seq(lost)))
    assert {"epoch"} == {await log.continuity(Position("other", seq)) for seq in on_record}


async def test_the_log_under_test_has_every_kind_of_change_that_the_tests_need(log: LogReader) -> None:
    kinds = [change.kind for change in await everything(log)]
    assert {Kind.UPDATE, Kind.INSERT, Kind.TRUNCATE, Kind.LIMIT} == set(kinds)
    assert 3 == kinds.count(Kind.LIMIT)
