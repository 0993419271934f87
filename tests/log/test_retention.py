"""Retention: old segments are dropped without blocking writers, and readers always notice."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial

import asyncpg
import pytest
from structlog.testing import capture_logs

from daemon.core.change import Position, Seq, Topic
from daemon.core.errors import LogTruncated
from daemon.log import retention as module
from daemon.log.queries import query
from daemon.log.reader import PgLogReader
from daemon.log.retention import DROP_SETTINGS, Retention
from daemon.log.sequencer import Sequencer
from daemon.metrics import REGISTRY
from daemon.postgres.connect import Connection, Pool, connect, open_pool
from tests.support.log import leader, until_numbered

pytestmark = pytest.mark.usefixtures("rows")

WEEK = timedelta(days=7)


def make_retention(database: str, pool: Pool, sequencer: Sequencer) -> Retention:
    connecting = partial(connect, database, application_name="retention", server_settings=DROP_SETTINGS)
    return Retention(pool, connecting, sequencer, WEEK)


async def open_next_segment(pool: Pool, sequencer: Sequencer) -> None:
    """Make the leader continue in the next segment, and wait until it does."""
    before = await pool.fetchval("select max(term) from rowcast.terms")
    sequencer.open_next_segment()
    while before == await pool.fetchval("select max(term) from rowcast.terms"):
        await asyncio.sleep(0)


async def age(pool: Pool) -> None:
    """Make all segments eight days older."""
    await pool.execute("update rowcast.segments set opened_at = opened_at - interval '8 days'")


async def write(sql: Connection, pool: Pool, version: int) -> Seq:
    """Write a new version of the first row, and return its seq."""
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


async def test_a_stream_continues_across_segments(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool) as sequencer:
        before = await write(sql, pool, 1)
        await open_next_segment(pool, sequencer)
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
        retention, log = make_retention(database, pool, sequencer), PgLogReader(pool)
        first = await write(sql, pool, 1)
        second = await write(sql, pool, 2)
        await retention.sweep()
        for version in (3, 4):
            await open_next_segment(pool, sequencer)
            third = await write(sql, pool, version)
            await retention.sweep()
        assert ["events_0", "events_1", "events_2", "events_3", "log_0", "log_1", "log_2", "log_3"] == await tables(
            pool
        )
        await age(pool)
        await pool.execute("update rowcast.segments set opened_at = now() where segment = 2")
        await retention.sweep()
        # Segment 1 was closed just now. Its log may number events of segment 0.
        assert ["events_0", "events_1", "events_2", "events_3", "log_1", "log_2", "log_3"] == await tables(pool)
        epoch = (await log.head()).epoch
        assert "retention" == await log.continuity(Position(epoch, first))
        assert await log.continuity(Position(epoch, second)) is None  # it is past everything that was dropped
        await age(pool)
        await retention.sweep()
        assert "events_0" not in await tables(pool)
        assert "log_1" not in await tables(pool)
        assert "retention" == await log.continuity(Position(epoch, second))
        assert await log.continuity(Position(epoch, third)) is None
        await write(sql, pool, 5)
        assert 2 == len(await log.read(Seq(0), 1000))


async def test_numbers_lost_in_a_crash_stay_lost_when_an_idle_term_closes_the_segment(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool, killed=True):
        lost = await write(sql, pool, 1) + 1
    async with leader(database, pool) as sequencer:
        await open_next_segment(pool, sequencer)
    log = PgLogReader(pool)
    assert "crash" == await log.continuity(Position((await log.head()).epoch, Seq(lost)))


async def test_the_floor_of_the_log_is_reported(database: str, pool: Pool, sql: Connection) -> None:
    floors: list[Seq] = []
    connecting = partial(connect, database, application_name="retention", server_settings=DROP_SETTINGS)
    async with leader(database, pool) as sequencer:
        retention = Retention(pool, connecting, sequencer, WEEK, floors.append)
        await retention.sweep()
        head = await write(sql, pool, 1)
        await open_next_segment(pool, sequencer)
        await age(pool)
        await retention.check_floor()
        await retention.sweep()
        await retention.check_floor()
    assert [0, head] == floors


async def test_events_of_a_long_transaction_outlive_their_segment_of_the_log(
    database: str, pool: Pool, sql: Connection
) -> None:
    late = await connect(database, application_name="late")
    async with leader(database, pool) as sequencer:
        retention = make_retention(database, pool, sequencer)
        transaction = late.transaction()
        await transaction.start()
        await late.execute("update app.rows set version = 7 where id = 7")
        for _ in range(3):
            await open_next_segment(pool, sequencer)
            await retention.sweep()
            await age(pool)
            await retention.sweep()
        assert "log_0" not in await tables(pool)
        assert "events_0" in await tables(pool)
        await transaction.commit()
        await until_numbered(pool)
        assert ['{"id":7,"version":7}'] == await versions(pool)
        for _ in range(3):
            await open_next_segment(pool, sequencer)
            await retention.sweep()
            await age(pool)
            await retention.sweep()
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


async def test_writers_do_not_wait_while_dropping_waits_for_a_reader(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        retention = make_retention(database, pool, sequencer)
        await write(sql, pool, 1)
        for version in (2, 3):
            await open_next_segment(pool, sequencer)
            await write(sql, pool, version)
            await retention.sweep()
        async with an_open_reader(database) as reader:
            await age(pool)
            sweeping = asyncio.create_task(retention.sweep())
            while not await pool.fetchval(
                """select exists (select from pg_stat_activity
                   where application_name = 'retention' and wait_event_type = 'Lock' and query like '%detach%')"""
            ):
                assert not sweeping.done(), "dropping did not wait for the reader"
                await asyncio.sleep(0)
            await sql.execute("set lock_timeout = '1ms'")  # a writer that waits at all fails
            for version in range(10, 30):
                await write(sql, pool, version)
            assert 3 == len(await reader.fetch("select * from rowcast.changes"))
            assert not sweeping.done()
        await sweeping
        assert "log_0" not in await tables(pool)
        assert 20 <= len(await PgLogReader(pool).read(Seq(0), 1000))


async def test_an_interrupted_detach_is_finalized(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool) as sequencer:
        impatient = partial(connect, database, application_name="retention", server_settings={"lock_timeout": "1ms"})
        retention = Retention(pool, impatient, sequencer, WEEK)
        await retention.sweep()
        await write(sql, pool, 1)
        await open_next_segment(pool, sequencer)
        await write(sql, pool, 2)
        async with an_open_reader(database):
            await age(pool)
            for _ in range(2):
                with pytest.raises(asyncpg.LockNotAvailableError):
                    await retention.sweep()
            assert await pool.fetchval("select bool_or(inhdetachpending) from pg_inherits")
            await write(sql, pool, 3)
        await make_retention(database, pool, sequencer).sweep()
        assert "log_0" not in await tables(pool)


async def test_a_replay_fails_instead_of_skipping_changes_that_were_dropped_meanwhile(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        await write(sql, pool, 1)
        head = await write(sql, pool, 2)
        await open_next_segment(pool, sequencer)
        await age(pool)
        topics = [Topic("row:1")]
        assert 2 == len(await PgLogReader(pool).read_topics(topics, Seq(0), head, 10))
        await pool.execute("select rowcast.retire_segments($1)", WEEK)
        with pytest.raises(LogTruncated):
            await PgLogReader(pool).read_topics(topics, Seq(0), head, 10)
        assert [] == await PgLogReader(pool).read_topics(topics, head, head, 10)


async def test_old_grants_and_terms_are_deleted_with_the_log(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool) as sequencer:
        retention = make_retention(database, pool, sequencer)
        await sql.execute("insert into chatgenius.channels (name) values ('one')")
        await until_numbered(pool)
        assert 1 == await pool.fetchval("select count(*) from rowcast.grants")
        for _ in range(3):
            await open_next_segment(pool, sequencer)
            await write(sql, pool, 1)
            await retention.sweep()
        await age(pool)
        await retention.sweep()
        assert 0 == await pool.fetchval("select count(*) from rowcast.grants")
        head = await PgLogReader(pool).head()
        assert await PgLogReader(pool).continuity(head) is None


async def test_the_leader_opens_the_next_segment_when_the_open_one_is_old_enough(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        retention = make_retention(database, pool, sequencer)
        before = await pool.fetchval("select max(term) from rowcast.terms")
        await retention.sweep()
        await write(sql, pool, 1)
        assert before == await pool.fetchval("select max(term) from rowcast.terms")
        await pool.execute("update rowcast.segments set opened_at = now() - interval '2 days'")
        await retention.sweep()
        while before == await pool.fetchval("select max(term) from rowcast.terms"):
            await asyncio.sleep(0)
        await write(sql, pool, 2)
        assert 2 == await pool.fetchval("select count(distinct tableoid) from rowcast.log")


async def test_dead_letters_are_deleted_with_the_log_that_they_stand_in(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        retention = make_retention(database, pool, sequencer)
        await write(sql, pool, 1)
        await open_next_segment(pool, sequencer)
        await write(sql, pool, 2)
        await sql.execute(
            """insert into rowcast.dead_letters (seq, pack, schema_name, table_name, topic, kind, key, reason)
               select l.seq, 'app', 'app', 'rows', l.topic, 'insert', '{}', 'a test' from rowcast.log as l"""
        )
        await age(pool)
        await retention.sweep()
        kept = await pool.fetch("select seq from rowcast.dead_letters")
        assert await pool.fetch("select seq from rowcast.log") == kept
        assert 1 == len(kept)


@asynccontextmanager
async def failing(retention: Retention, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str]]:
    """Retention that runs, and whose failures become problems at once; yields the reasons that it logs."""
    monkeypatch.setattr(module, "MAX_AGE", 0.2)
    monkeypatch.setattr(module, "RETRY_DELAY", 0.01)
    reasons: list[str] = []
    with capture_logs() as logged:
        task = asyncio.create_task(retention.run())
        try:
            yield reasons
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            reasons += [f"{line['work']}: {line['reason']}" for line in logged if line["event"] == "retention_failed"]


REMAINS = "content of deleted rows is not being removed"
BREAK_PURGE = {
    "a lock": ("select", "LockNotAvailableError 55P03"),
    "a read-only session": ("select", "ReadOnlySQLTransactionError 25006"),
    "a missing function": (
        "alter function rowcast.purge(integer) rename to elsewhere",
        "UndefinedFunctionError 42883",
    ),
}


@pytest.mark.parametrize("how", BREAK_PURGE)
async def test_a_purge_that_fails_makes_the_daemon_unready_and_is_logged_once_with_its_reason(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    breaking, reason = BREAK_PURGE[how]
    settings = {"lock_timeout": "50ms"} | (
        {"default_transaction_read_only": "on"} if how == "a read-only session" else {}
    )
    limited = await open_pool(database, application_name="limited", server_settings=settings, max_size=3)
    async with leader(database, pool) as sequencer:
        retention = make_retention(database, limited, sequencer)
        await write(sql, pool, 1)
        await sql.execute(breaking)
        if how == "a lock":
            await sql.execute("begin; lock table rowcast.dead_letters in exclusive mode")
        async with failing(retention, monkeypatch) as reasons:
            await pool.execute("delete from app.rows where id = 1")
            while [f"{REMAINS} ({reason})"] != retention.problems():
                await asyncio.sleep(0.01)
            age = REGISTRY.get_sample_value("rowcast_retention_delay_seconds", {"work": "purge"})
            assert age and age > 0.2
        await sql.execute("rollback")
    assert 1 == reasons.count(f"purge: {reason}")
    await limited.close()


async def test_a_sweep_that_fails_is_a_warning_until_the_log_is_twice_as_long_as_it_should_be(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with leader(database, pool) as sequencer:
        retention = make_retention(database, pool, sequencer)
        await sql.execute("alter function rowcast.retire_segments(interval) rename to elsewhere")
        async with failing(retention, monkeypatch) as reasons:
            while not retention.warnings():
                await asyncio.sleep(0.01)
            problem = "old segments are not being dropped (UndefinedFunctionError 42883)"
            assert ([problem], []) == (retention.warnings(), retention.problems())
            retention._keep = timedelta(seconds=0.1)
            assert [problem] == retention.problems()
    assert ["sweep: UndefinedFunctionError 42883"] == reasons


async def test_retention_of_a_daemon_that_does_not_lead_has_no_problems(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with leader(database, pool), leader(database, pool, leads=False) as follower:
        retention = make_retention(database, pool, follower)
        await sql.execute("alter function rowcast.retire_segments(interval) rename to elsewhere")
        async with failing(retention, monkeypatch):
            await asyncio.sleep(0)
            while not follower.settled.is_set():
                await asyncio.sleep(0.01)
            assert ([], []) == (retention.warnings(), retention.problems())
            assert 0 == REGISTRY.get_sample_value("rowcast_retention_delay_seconds", {"work": "sweep"})


async def test_two_that_make_the_next_segment_at_once_do_not_fail_each_other(pool: Pool, sql: Connection) -> None:
    await sql.execute("update rowcast.segments set opened_at = now()")
    async with sql.transaction():
        await sql.execute(query("make_segment"))
        other = asyncio.create_task(pool.execute(query("make_segment")))
        while not await pool.fetchval("select exists (select from pg_locks where not granted)"):
            await asyncio.sleep(0)
    await other
    assert await pool.fetchval("select count(*) > 0 from rowcast.segments where opened_at is null")
