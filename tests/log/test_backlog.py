"""Readiness follows the age of the oldest event without a number, whoever leads."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from daemon.core.change import Seq
from daemon.log.backlog import Backlog
from daemon.log.sequencer import Sequencer
from daemon.postgres.connect import SESSION, Connection, Pool, connect, open_pool
from tests.support.log import ManualLeader, leader, until_numbered

pytestmark = pytest.mark.usefixtures("rows")

WRITE = "update app.rows set version = version + 1 where id = 1"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.log.backlog.CHECK_DELAY", 0.1)
    monkeypatch.setattr("daemon.log.backlog.MAX_AGE", 0.5)


class Recorded(Backlog):
    """Remembers what each check has found."""

    def __init__(self, pool: Pool, sequencer: Sequencer) -> None:
        super().__init__(pool, sequencer, lambda: Seq(0))
        self.found = asyncio.Queue[bool]()

    async def _moves(self, now: float) -> bool:
        moves = await super()._moves(now)
        self.found.put_nowait(moves)
        return moves


@asynccontextmanager
async def watching(pool: Pool, sequencer: Sequencer) -> AsyncIterator[Recorded]:
    backlog = Recorded(pool, sequencer)
    task = asyncio.create_task(backlog.run())
    try:
        yield backlog
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(backlog: Backlog, *, ready: bool) -> list[str]:
    async with asyncio.timeout(20):
        while ready == bool(backlog.reasons()):
            await asyncio.sleep(0.02)
    return backlog.reasons()


async def finds_no_backlog(backlog: Recorded, checks: int) -> None:
    """So many further checks find that numbering moves."""
    while not backlog.found.empty():
        backlog.found.get_nowait()
    for _ in range(checks):
        assert await backlog.found.get()


@pytest.fixture
def seldom(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leader that numbers only now and then, on a busy machine, still does between two checks."""
    monkeypatch.setattr("daemon.log.backlog.CHECK_DELAY", 1.0)


async def test_a_leader_that_hangs_makes_its_followers_not_ready(database: str, pool: Pool, sql: Connection) -> None:
    hanging = ManualLeader(await connect(database, application_name="hanging", server_settings=SESSION))
    await hanging.lead()
    async with leader(database, pool, leads=False) as follower, watching(pool, follower) as backlog:
        await finds_no_backlog(backlog, 10)
        await sql.execute(WRITE)
        assert ["events are not being numbered (the leader does nothing)"] == await until(backlog, ready=False)
        assert backlog.age > 0.5
        await hanging.number()
        await until(backlog, ready=True)
        assert 0.0 == backlog.age
    await hanging.connection.close()


async def test_a_locked_table_makes_leader_and_follower_not_ready(database: str, pool: Pool, sql: Connection) -> None:
    async with (
        leader(database, pool) as first,
        leader(database, pool, leads=False) as second,
        watching(pool, first) as one,
        watching(pool, second) as other,
    ):
        async with sql.transaction():
            await sql.execute("lock table rowcast.batches")
            await sql.execute(WRITE)
        await until_numbered(pool)
        async with sql.transaction():
            await sql.execute(WRITE)
            await sql.execute("lock table rowcast.batches")
            for backlog in (one, other):
                [reason] = await until(backlog, ready=False)
                assert "number events" in reason or "being numbered" in reason
        await until_numbered(pool)
        for backlog in (one, other):
            await until(backlog, ready=True)


async def test_without_any_leader_a_daemon_is_not_ready_and_says_why(
    database: str, pool: Pool, sql: Connection
) -> None:
    name = await sql.fetchval("select current_database()")
    await sql.execute(f"alter database {name} set default_transaction_read_only = on")
    async with leader(database, pool, leads=False) as sequencer, watching(pool, sequencer) as backlog:
        assert ["no daemon can number events (ReadOnlyDatabase)"] == await until(backlog, ready=False)
        await sql.execute(f"alter database {name} reset default_transaction_read_only")
        await until(backlog, ready=True)


@pytest.mark.usefixtures("seldom")
async def test_a_long_transaction_that_has_just_committed_is_no_backlog(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer, watching(pool, sequencer) as backlog:
        async with sql.transaction():
            await sql.execute(WRITE)
            await sql.execute("select pg_sleep(1)")
        await finds_no_backlog(backlog, 3)


@pytest.mark.usefixtures("seldom")
async def test_while_this_daemon_numbers_the_database_is_not_asked(
    database: str, pool: Pool, sql: Connection
) -> None:
    closed = await open_pool(database, application_name="closed")
    await closed.close()  # a check would fail
    async with leader(database, pool) as sequencer, watching(closed, sequencer) as backlog:
        await finds_no_backlog(backlog, 3)
