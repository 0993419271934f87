"""Who numbers: a lease that only the daemon's role can write, and that two leaders never use at once."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

import asyncpg
import pytest

from daemon.log.reader import PgLogReader
from daemon.log.sequencer import FOLLOWER_LOCK, LEASE, Sequencer
from daemon.log.wakeup_lock import WAKEUP_LOCK
from daemon.postgres.connect import SESSION, Connection, Pool, connect
from tests.support.log import ManualLeader, expire_lease, leader, until_numbered

pytestmark = pytest.mark.usefixtures("rows")

FENCE = "where exists (select from fence)"
LEASE_IS_OURS = "where l.nonce = $1 and l.xmin = l.xid::xid and "
WRITE = "update app.rows set version = version + 1 where id = 1"


@pytest.fixture
async def two(database: str) -> AsyncIterator[tuple[Connection, Connection]]:
    """The connections of two leaders."""
    connections = [await connect(database, application_name=name, server_settings=SESSION) for name in "ab"]
    yield connections[0], connections[1]
    for connection in connections:
        await connection.close()


each_statement = pytest.mark.parametrize("few", [False, True], ids=["full", "few"])


async def waits(sql: Connection, connection: Connection, task: "asyncio.Task[bool]") -> None:
    """Wait until a task's statement waits for a lock."""
    pid = connection.get_server_pid()
    while not await sql.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid):
        assert not task.done(), task.result()


async def numbered_twice(pool: Pool) -> int:
    """How many events have two numbers."""
    count: int = await pool.fetchval(
        "select count(*) - count(distinct (xid::text, event_id)) from rowcast.log where event_id is not null"
    )
    return count


@each_statement
@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_nobody_takes_over_while_a_batch_is_being_numbered(
    two: tuple[Connection, Connection], pool: Pool, sql: Connection, ends: str, few: bool
) -> None:
    old, new = (ManualLeader(connection, few=few) for connection in two)
    assert await old.lead()
    await sql.execute(WRITE)
    await expire_lease(sql)
    transaction = old.connection.transaction()
    await transaction.start()
    assert await old.number()
    assert not await new.lead()
    await (transaction.commit() if ends == "commit" else transaction.rollback())
    assert await new.lead()
    await sql.execute(WRITE)
    assert await new.number()
    assert not await old.number()
    assert (2, 0) == (await pool.fetchval("select count(*) from rowcast.log"), await numbered_twice(pool))


@each_statement
@pytest.mark.parametrize("ends", ["commit", "rollback"])
async def test_a_batch_waits_for_a_takeover_and_is_written_only_if_that_fails(
    two: tuple[Connection, Connection], pool: Pool, sql: Connection, ends: str, few: bool
) -> None:
    old, new = (ManualLeader(connection, few=few) for connection in two)
    assert await old.lead()
    await sql.execute(WRITE)
    await expire_lease(sql)
    transaction = new.connection.transaction()
    await transaction.start()
    assert await new.lead()
    numbering = asyncio.create_task(old.number())
    await waits(sql, old.connection, numbering)
    await (transaction.commit() if ends == "commit" else transaction.rollback())
    assert (ends == "rollback") == await numbering
    await sql.execute(WRITE)
    leads, other = (new, old) if ends == "commit" else (old, new)
    assert await leads.number()
    if other is old:
        assert not await old.number()
    assert (2, 0) == (await pool.fetchval("select count(*) from rowcast.log"), await numbered_twice(pool))


@each_statement
async def test_a_batch_that_is_not_fenced_would_number_an_event_twice(
    two: tuple[Connection, Connection], pool: Pool, sql: Connection, few: bool
) -> None:
    old, new = ManualLeader(two[0], [(FENCE, "where true")], few=few), ManualLeader(two[1])
    assert await old.lead()
    await sql.execute(WRITE)
    assert await old.number()
    await sql.execute(WRITE)
    await expire_lease(sql)
    assert await new.lead()
    assert await new.number()
    await old.number()
    assert 1 == await numbered_twice(pool)


@each_statement
async def test_a_nonce_that_is_not_checked_again_after_the_wait_would_number_an_event_twice(
    two: tuple[Connection, Connection], pool: Pool, sql: Connection, few: bool
) -> None:
    unchecked = LEASE_IS_OURS.replace("l.nonce = $1", "$1::uuid is not null")
    old, new = ManualLeader(two[0], [(LEASE_IS_OURS, unchecked)], few=few), ManualLeader(two[1])
    assert await old.lead()
    await sql.execute(WRITE)
    assert await old.number()
    await sql.execute(WRITE)
    await expire_lease(sql)
    assert await new.lead()
    assert await new.number()
    await old.number()
    assert 1 == await numbered_twice(pool)


async def test_a_lease_that_is_held_cannot_be_taken(two: tuple[Connection, Connection]) -> None:
    old, new = map(ManualLeader, two)
    assert await old.lead()
    assert not await new.lead()
    assert await old.lead(), "its holder may open the next term"


@each_statement
async def test_an_idle_poll_takes_no_lock_and_no_transaction_id(
    two: tuple[Connection, Connection], sql: Connection, few: bool
) -> None:
    alone = ManualLeader(two[0], few=few)
    await alone.lead()
    async with two[0].transaction():
        assert await alone.number()
        assert await two[0].fetchval("select pg_current_xact_id_if_assigned()") is None
        assert 1 == await sql.fetchval("select count(*) from (select from rowcast.lease for update nowait) as l")


async def test_a_stranger_with_the_public_locks_stops_neither_leader_nor_follower(
    database: str, pool: Pool, sql: Connection
) -> None:
    stranger = await connect(database, application_name="stranger")
    for lock in (0x526F7763617374, FOLLOWER_LOCK, WAKEUP_LOCK):
        await stranger.execute("select pg_advisory_lock($1)", lock)
    async with leader(database, pool), leader(database, pool, leads=False) as follower:
        await follower.settled.wait()
        await sql.execute(WRITE)
        await until_numbered(pool)
        assert not follower.leading.is_set()
    await stranger.close()


async def test_only_the_owner_of_the_schema_can_touch_the_lease(database: str, sql: Connection) -> None:
    role, password = f"stranger_{secrets.token_hex(4)}", secrets.token_hex(8)
    await sql.execute(f"create role {role} login password '{password}'")
    stranger = await asyncpg.connect(database, user=role, password=password)
    try:
        for statement in (
            "select from rowcast.lease for share",
            "update rowcast.lease set expires_at = 'infinity'",
            "begin; lock table rowcast.lease; commit",
            "select rowcast.open_term(gen_random_uuid(), null, '8 s', false, null, 0)",
            "select rowcast.lease_holder()",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await stranger.execute(statement)
            await stranger.execute("rollback")
    finally:
        await stranger.close()
        await sql.execute(f"drop role {role}")


async def test_a_leader_that_does_nothing_is_replaced_when_its_lease_expires(
    two: tuple[Connection, Connection], database: str, pool: Pool, sql: Connection
) -> None:
    hanging = ManualLeader(two[0])
    assert await hanging.lead()
    await sql.execute("update rowcast.lease set expires_at = now() + '1 s', xid = pg_current_xact_id()")
    async with leader(database, pool):  # once it leads
        await sql.execute(WRITE)
        await until_numbered(pool)
        assert not await hanging.number()


async def test_the_lease_of_an_idle_leader_does_not_expire(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.log.sequencer.LEASE", timedelta(seconds=2))
    monkeypatch.setattr("daemon.log.sequencer.RENEW_DELAY", 0.2)
    async with leader(database, pool, poll_every=3600):
        first = await sql.fetchrow("select nonce, renewed_at from rowcast.lease")
        assert first is not None
        while await sql.fetchval(
            "select renewed_at < $1::timestamptz + interval '4 s' from rowcast.lease", first["renewed_at"]
        ):
            assert first["nonce"] == await sql.fetchval("select rowcast.lease_holder()")
            await asyncio.sleep(0.05)


async def test_a_leader_that_stops_in_order_releases_the_lease(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool):
        pass
    assert await sql.fetchval("select released and expires_at <= clock_timestamp() from rowcast.lease")


async def test_a_daemon_that_cannot_write_lets_another_lead(database: str, pool: Pool, sql: Connection) -> None:
    settings = {**SESSION, "default_transaction_read_only": "on"}
    connecting = partial(connect, database, application_name="read only", server_settings=settings)
    broken = Sequencer(connecting, pool, asyncio.Event(), asyncio.Event(), poll_every=0.01)
    task = asyncio.create_task(broken.run())
    while not broken.failure:
        await asyncio.sleep(0.01)
    assert "ReadOnlySQLTransactionError 25006" == broken.failure
    async with leader(database, pool):
        await sql.execute(WRITE)
        await until_numbered(pool)
        while broken.failure:  # another leads, so nothing is wrong
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_three_hundred_leaders_without_events_use_up_no_numbers(database: str, sql: Connection) -> None:
    connection = await connect(database, application_name="leader", server_settings=SESSION)
    one = ManualLeader(connection)
    await one.lead()
    await sql.execute(WRITE)
    await one.number()
    await one.lead()
    base = one.base
    for _ in range(300):
        await one.lead()
        assert await one.number()
    assert base == one.base
    await connection.close()


async def test_three_hundred_leaders_with_events_use_up_a_small_part_of_a_segment(
    database: str, pool: Pool, sql: Connection
) -> None:
    connection = await connect(database, application_name="leader", server_settings=SESSION)
    one = ManualLeader(connection)
    jumps = []
    for _ in range(300):
        before = one.base if one.nonce else 0
        await one.lead()
        jumps.append(one.base - before)
        await sql.execute(WRITE)
        assert await one.number()
    assert 2**17 <= min(jumps[1:])
    assert 290 < len(set(jumps))
    assert one.base < 300 * 2**21 < 2**31
    epoch = (await PgLogReader(pool).head()).epoch
    assert [epoch] == [row["epoch"] for row in await pool.fetch("select distinct epoch from rowcast.terms")]
    await connection.close()


async def test_a_segment_whose_numbers_run_out_is_left_at_the_next_term(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await sql.execute(WRITE)
        await until_numbered(pool)
    for segment in range(1, 4):  # also when no segment was made ahead
        nearly_full = (segment - 1 << 32) + (3 << 30)
        await sql.execute(
            "update rowcast.batches set last_seq = $1 where last_seq = (select max(last_seq) from rowcast.batches)",
            nearly_full,
        )
        async with leader(database, pool):
            await sql.execute(WRITE)
            await until_numbered(pool)
        newest = await pool.fetchval("select max(seq) from rowcast.log")
        assert segment << 32 < newest < (segment << 32) + 2**31


async def test_the_numbers_that_a_crash_can_undo_are_fewer_than_a_term_jumps_over(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.log.sequencer.MAX_UNFLUSHED", 20)
    async with leader(database, pool) as sequencer:
        for _ in range(12):
            await sql.execute("update app.rows set version = version + 1")
            await until_numbered(pool)
            head = await pool.fetchval("select max(seq) from rowcast.log")
            assert sequencer._known_seq > 0, "the first batch of a term is flushed"
            assert head - sequencer._known_seq <= 20
    assert LEASE.total_seconds() < 10
