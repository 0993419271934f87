"""A log that was restored or truncated never gives an old number to a new event, and clients learn of it."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import asyncpg
import pytest

from daemon.core.change import Position
from daemon.core.errors import LogUnavailable
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Connection, Pool
from tests.support.log import leader, until_numbered

pytestmark = pytest.mark.usefixtures("rows")

WRITE = "update app.rows set version = version + 1 where id = 1"
TABLES = ("events", "log", "batches", "terms", "lease", "segments", "grants", "tombstones")


async def save(sql: Connection) -> None:
    """Copy the rows of Rowcast's tables, as a dump of the data does."""
    await sql.execute("drop schema if exists saved cascade; create schema saved")
    for table in TABLES:
        await sql.execute(f"create table saved.{table} as table rowcast.{table}")


async def restore(sql: Connection) -> None:
    """Put those rows back, in one transaction."""
    async with sql.transaction():
        await sql.execute(f"truncate {', '.join(f'rowcast.{table}' for table in TABLES)}")
        for table in TABLES:
            await sql.execute(f"insert into rowcast.{table} table saved.{table}")


async def write(sql: Connection, pool: Pool, times: int = 1) -> Position:
    """Write some changes, and return the position after them."""
    for _ in range(times):
        await sql.execute(WRITE)
    await until_numbered(pool)
    return await PgLogReader(pool).head()


async def truncate(sql: Connection) -> None:
    await sql.execute("truncate rowcast.events, rowcast.log")


async def truncate_events(sql: Connection) -> None:
    await sql.execute("truncate rowcast.events")


async def truncate_log(sql: Connection) -> None:
    await sql.execute("truncate rowcast.log")


async def truncate_everything(sql: Connection) -> None:
    tables = ", ".join(f"rowcast.{table}" for table in TABLES if table != "segments")
    while True:
        with suppress(asyncpg.DeadlockDetectedError):  # with the leader
            await sql.execute(f"truncate {tables}")
            return


async def forget_terms(sql: Connection) -> None:
    await sql.execute("delete from rowcast.terms")


async def write_terms_again(sql: Connection) -> None:
    await sql.execute("create temp table kept as table rowcast.terms; delete from rowcast.terms")
    await sql.execute("insert into rowcast.terms table kept; drop table kept")


FAULTS = [restore, truncate, truncate_events, truncate_log, truncate_everything, forget_terms, write_terms_again]
Fault = Callable[[Connection], Awaitable[None]]


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is renewed, and the log looked at, ten times a second."""
    monkeypatch.setattr("daemon.log.sequencer.RENEW_DELAY", 0.1)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("state", ["running", "stopped", "killed"])
async def test_every_position_from_before_the_log_was_replaced_is_refused(
    database: str, pool: Pool, sql: Connection, fault: Fault, state: str
) -> None:
    log = PgLogReader(pool)
    async with leader(database, pool, killed=state == "killed") as sequencer:
        positions = [await log.head(), await write(sql, pool)]
        await save(sql)
        positions += [await write(sql, pool, 3) for _ in range(2)]
        if state == "running":
            led = sequencer.backend_pid
            await fault(sql)
            while sequencer.backend_pid == led or not sequencer.leading.is_set():
                await asyncio.sleep(0.01)
            new = await write(sql, pool, 3)
    if state != "running":
        await fault(sql)
        async with leader(database, pool):
            new = await write(sql, pool, 3)
    assert ["epoch"] * 4 == [await log.continuity(position) for position in positions]
    assert await log.continuity(new) is None


@pytest.mark.parametrize("fault", [truncate, truncate_log])
async def test_a_position_in_a_log_that_was_truncated_a_moment_ago_is_refused(
    database: str, pool: Pool, sql: Connection, fault: Fault
) -> None:
    log = PgLogReader(pool)
    async with leader(database, pool):
        before = await write(sql, pool)
    await fault(sql)
    with pytest.raises(LogUnavailable, match="no leader"):  # the next one decides
        await log.continuity(before)


async def test_restarts_and_failovers_keep_the_epoch_and_every_position(
    database: str, pool: Pool, sql: Connection
) -> None:
    log, positions = PgLogReader(pool), list[Position]()
    for number in range(8):
        async with leader(database, pool, killed=number % 3 == 0):
            positions.append(await log.head())
            if number % 2:
                positions.append(await write(sql, pool))
        positions.append(await log.head())
    assert [None] * len(positions) == [await log.continuity(position) for position in positions]
    assert 1 == len({position.epoch for position in positions})


async def test_an_old_copy_that_looks_like_a_restart_passes_over_the_numbers_of_the_other_past(
    database: str, pool: Pool, sql: Connection
) -> None:
    """As after a cold copy of the data directory was put back: every row is as its own transaction wrote it."""
    log = PgLogReader(pool)
    async with leader(database, pool):
        kept = await write(sql, pool)
    await sql.execute("create table app.kept as select max(term) as term from rowcast.terms")
    async with leader(database, pool):
        lost = [await log.head()] + [await write(sql, pool) for _ in range(5)]
    for table, column in (("log", "seq"), ("batches", "last_seq")):
        await sql.execute(f"delete from rowcast.{table} where {column} > $1", kept.seq)
    await sql.execute("delete from rowcast.terms where term > (select k.term from app.kept as k)")
    await sql.execute(
        "update rowcast.lease set xid = pg_current_xact_id(),"
        " nonce = (select t.nonce from rowcast.terms as t order by t.term desc limit 1)"
    )
    async with leader(database, pool):
        new = [await write(sql, pool) for _ in range(5)]
        assert {"epoch"} == {await log.continuity(position) for position in lost}
        assert await log.continuity(kept) is None
    assert not {position.seq for position in lost} & {position.seq for position in new}


async def test_a_daemon_that_saw_a_term_which_is_gone_begins_a_new_epoch(
    database: str, pool: Pool, sql: Connection
) -> None:
    """As when an old copy of the data directory is put back under a daemon that stays."""
    log = PgLogReader(pool)
    async with leader(database, pool):
        kept = await write(sql, pool)
    async with leader(database, pool) as sequencer:
        lost = await write(sql, pool)
        led = sequencer.backend_pid
        async with sql.transaction():
            await sql.execute("lock table rowcast.lease")
            await sql.execute("select pg_terminate_backend($1)", led)
            for table, column in (("log", "seq"), ("batches", "last_seq"), ("terms", "base")):
                await sql.execute(f"delete from rowcast.{table} where {column} > $1", kept.seq)
        while sequencer.backend_pid in (led, None) or not sequencer.leading.is_set():
            await asyncio.sleep(0.01)
        await write(sql, pool)
        assert ["epoch"] * 2 == [await log.continuity(position) for position in (kept, lost)]
