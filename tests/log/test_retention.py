"""How the log forgets what is old: in segments, without anybody waiting, and never behind a client's back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import asyncpg
import pytest

from daemon.core.change import Position, Seq, Topic
from daemon.core.errors import LogTruncated
from daemon.log.reader import PgLogReader
from daemon.log.retention import DROP_SETTINGS, Retention
from daemon.log.sequencer import Sequencer
from daemon.postgres.connect import Connection, Pool, connect
from tests.support.log import leader, until_numbered

pytestmark = pytest.mark.usefixtures("rows")

WEEK = timedelta(days=7)


def house(database: str, pool: Pool, sequencer: Sequencer) -> Retention:
    connecting = partial(connect, database, application_name="retention", server_settings=DROP_SETTINGS)
    return Retention(pool, connecting, sequencer, WEEK)


async def next_segment(pool: Pool, sequencer: Sequencer) -> None:
    """Let the leader go on in the next segment, and wait until it does."""
    before = await pool.fetchval("select max(term) from rowcast.terms")
    sequencer.open_next_segment()
    while before == await pool.fetchval("select max(term) from rowcast.terms"):
        await asyncio.sleep(0)


async def age(pool: Pool) -> None:
    """Let eight days pass for all segments."""
    await pool.execute("update rowcast.segments set opened_at = opened_at - interval '8 days'")


async def write(sql: Connection, pool: Pool, version: int) -> Seq:
    """A new version of the first row; its number."""
    await sql.execute("update app.rows set version = $1 where id = 1", version)
    await until_numbered(pool)
    return (await PgLogReader(pool).head()).seq


async def tables(pool: Pool) -> list[str]:
    rows = await pool.fetch(
        """select c.relname as name from pg_class as c join pg_namespace as n on n.oid = c.relnamespace
           where n.nspname = 'rowcast' and c.relname ~ '^(events|log)_[0-9]+$' and c.relkind = 'r' order by 1"""
    )
    return [row["name"] for row in rows]


async def versions(pool: Pool, after: int = 0) -> list[str]:
    return [change.record or "" for change in await PgLogReader(pool).read(Seq(after), 1000)]


async def test_the_log_goes_on_in_the_next_segment_without_a_gap_for_anybody(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        before = await write(sql, pool, 1)
        await next_segment(pool, sequencer)
        after = await write(sql, pool, 2)
        head = await PgLogReader(pool).head()
    assert 2 == await pool.fetchval("select count(distinct tableoid) from rowcast.log")
    assert 2 == await pool.fetchval("select count(distinct tableoid) from rowcast.events")
    assert after > before + 1
    assert await PgLogReader(pool).continuity(Position(head.epoch, before)) is None
    assert 2 == len(await PgLogReader(pool).read(Seq(0), 1000))


async def test_old_segments_are_dropped_and_positions_in_them_are_below_the_floor(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        keeper, log = house(database, pool, sequencer), PgLogReader(pool)
        first = await write(sql, pool, 1)
        second = await write(sql, pool, 2)
        await keeper.sweep()
        for version in (3, 4):
            await next_segment(pool, sequencer)
            third = await write(sql, pool, version)
            await keeper.sweep()
        assert ["events_0", "events_1", "events_2", "events_3", "log_0", "log_1", "log_2", "log_3"] == await tables(
            pool
        )
        await age(pool)
        await pool.execute("update rowcast.segments set opened_at = now() where segment = 2")
        await keeper.sweep()
        # Segment 1 was closed a moment ago. Its log may hold numbers of events that began in segment 0.
        assert ["events_0", "events_1", "events_2", "events_3", "log_1", "log_2", "log_3"] == await tables(pool)
        epoch = (await log.head()).epoch
        assert "retention" == await log.continuity(Position(epoch, first))
        assert await log.continuity(Position(epoch, second)) is None  # all that was dropped has been seen
        await age(pool)
        await keeper.sweep()
        assert "events_0" not in await tables(pool)
        assert "log_1" not in await tables(pool)
        assert "retention" == await log.continuity(Position(epoch, second))
        assert await log.continuity(Position(epoch, third)) is None
        await write(sql, pool, 5)
        assert 2 == len(await log.read(Seq(0), 1000))


async def test_a_segment_that_ends_with_an_idle_term_does_not_record_what_the_term_before_has_lost(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        lost = await write(sql, pool, 1) + 1
    async with leader(database, pool) as sequencer:
        await next_segment(pool, sequencer)
    log = PgLogReader(pool)
    assert "crash" == await log.continuity(Position((await log.head()).epoch, Seq(lost)))


async def test_whoever_serves_is_told_where_the_log_begins(database: str, pool: Pool, sql: Connection) -> None:
    told: list[Seq] = []
    connecting = partial(connect, database, application_name="retention", server_settings=DROP_SETTINGS)
    async with leader(database, pool) as sequencer:
        keeper = Retention(pool, connecting, sequencer, WEEK, told.append)
        await keeper.sweep()
        head = await write(sql, pool, 1)
        await next_segment(pool, sequencer)
        await age(pool)
        await keeper.check_floor()
        await keeper.sweep()
        await keeper.check_floor()
    assert [0, head] == told


async def test_events_of_a_transaction_that_was_open_for_long_outlive_their_segment(
    database: str, pool: Pool, sql: Connection
) -> None:
    late = await connect(database, application_name="late")
    async with leader(database, pool) as sequencer:
        keeper = house(database, pool, sequencer)
        transaction = late.transaction()
        await transaction.start()
        await late.execute("update app.rows set version = 7 where id = 7")
        for _ in range(3):
            await next_segment(pool, sequencer)
            await keeper.sweep()
            await age(pool)
            await keeper.sweep()
        assert "log_0" not in await tables(pool)
        assert "events_0" in await tables(pool)
        await transaction.commit()
        await until_numbered(pool)
        assert ['{"id":7,"version":7}'] == await versions(pool)
        for _ in range(3):
            await next_segment(pool, sequencer)
            await keeper.sweep()
            await age(pool)
            await keeper.sweep()
        assert "events_0" not in await tables(pool)
    await late.close()


@asynccontextmanager
async def an_open_reader(database: str) -> AsyncIterator[Connection]:
    reader = await connect(database, application_name="reader")
    transaction = reader.transaction(isolation="repeatable_read")
    await transaction.start()
    await reader.fetch("select * from rowcast.changes")
    try:
        yield reader
    finally:
        await transaction.rollback()
        await reader.close()


async def test_nobody_who_writes_waits_while_dropping_waits_for_a_reader(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        keeper = house(database, pool, sequencer)
        await write(sql, pool, 1)
        for version in (2, 3):
            await next_segment(pool, sequencer)
            await write(sql, pool, version)
            await keeper.sweep()
        async with an_open_reader(database) as reader:
            await age(pool)
            sweeping = asyncio.create_task(keeper.sweep())
            while not await pool.fetchval(
                """select exists (select from pg_stat_activity
                   where application_name = 'retention' and wait_event_type = 'Lock' and query like '%detach%')"""
            ):
                assert not sweeping.done(), "dropping did not wait for the reader"
                await asyncio.sleep(0)
            await sql.execute("set lock_timeout = '1ms'")  # whoever waits at all, fails
            for version in range(10, 30):
                await write(sql, pool, version)
            assert 3 == len(await reader.fetch("select * from rowcast.changes"))
            assert not sweeping.done()
        await sweeping
        assert "log_0" not in await tables(pool)
        assert 20 <= len(await PgLogReader(pool).read(Seq(0), 1000))


async def test_a_detaching_that_was_cut_off_is_brought_to_its_end(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool) as sequencer:
        impatient = partial(connect, database, application_name="retention", server_settings={"lock_timeout": "1ms"})
        keeper = Retention(pool, impatient, sequencer, WEEK)
        await keeper.sweep()
        await write(sql, pool, 1)
        await next_segment(pool, sequencer)
        await write(sql, pool, 2)
        async with an_open_reader(database):
            await age(pool)
            for _ in range(2):
                with pytest.raises(asyncpg.LockNotAvailableError):
                    await keeper.sweep()
            assert await pool.fetchval("select bool_or(inhdetachpending) from pg_inherits")
            await write(sql, pool, 3)
        await house(database, pool, sequencer).sweep()
        assert "log_0" not in await tables(pool)


async def test_a_replay_whose_log_is_dropped_under_it_fails_instead_of_skipping(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        await write(sql, pool, 1)
        head = await write(sql, pool, 2)
        await next_segment(pool, sequencer)
        await age(pool)
        topics = [Topic("row:1")]
        assert 2 == len((await PgLogReader(pool).read_topics(topics, Seq(0), head, 10)).changes)
        await pool.execute("select rowcast.retire_segments($1)", WEEK)
        with pytest.raises(LogTruncated):
            await PgLogReader(pool).read_topics(topics, Seq(0), head, 10)
        assert [] == (await PgLogReader(pool).read_topics(topics, head, head, 10)).changes


async def test_what_rights_and_terms_are_known_of_goes_with_the_log(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        keeper = house(database, pool, sequencer)
        await sql.execute("insert into chatgenius.channels (name) values ('one')")
        await until_numbered(pool)
        assert 1 == await pool.fetchval("select count(*) from rowcast.grants")
        for _ in range(3):
            await next_segment(pool, sequencer)
            await write(sql, pool, 1)
            await keeper.sweep()
        await age(pool)
        await keeper.sweep()
        assert 0 == await pool.fetchval("select count(*) from rowcast.grants")
        head = await PgLogReader(pool).head()
        assert await PgLogReader(pool).continuity(head) is None


async def test_the_leader_opens_a_segment_when_the_last_is_old_enough(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        keeper = house(database, pool, sequencer)
        before = await pool.fetchval("select max(term) from rowcast.terms")
        await keeper.sweep()
        await write(sql, pool, 1)
        assert before == await pool.fetchval("select max(term) from rowcast.terms")
        await pool.execute("update rowcast.segments set opened_at = now() - interval '2 days'")
        await keeper.sweep()
        while before == await pool.fetchval("select max(term) from rowcast.terms"):
            await asyncio.sleep(0)
        await write(sql, pool, 2)
        assert 2 == await pool.fetchval("select count(distinct tableoid) from rowcast.log")
