"""The wakeup lock on a real Postgres: writers notify only a sleeping leader, and no wakeup is lost."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import pytest

from daemon.core import adaptive_polling
from daemon.core.adaptive_polling import State
from daemon.log.notifier import Notifier
from daemon.log.queries import query
from daemon.log.sequencer import FOLLOWER_LOCK, Sequencer
from daemon.log.wakeup_lock import WAKEUP_LOCK, WakeupLock
from daemon.metrics import REGISTRY
from daemon.postgres.connect import SESSION, Connection, Pool, connect
from tests.support.log import leader, until_numbered

pytestmark = pytest.mark.usefixtures("rows")

NEVER = 3600.0  # seconds between polls: polling finds nothing
WRITE = "update app.rows set version = version + 1 where id = $1"
WAITERS = "select count(*) from pg_locks where locktype = 'advisory' and not granted"
KILL = "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'wakeup lock'"


@asynccontextmanager
async def wakeup_lock(database: str) -> AsyncIterator[tuple[WakeupLock, asyncio.Event]]:
    """A lock that is not wanted yet, and an event that is set when it is taken, released or lost."""
    changed = asyncio.Event()
    lock = WakeupLock(
        partial(connect, database, application_name="wakeup lock", server_settings=SESSION), changed.set
    )
    task = asyncio.create_task(lock.run())
    try:
        yield lock, changed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until_requested(sql: Connection) -> None:
    """Wait until a session waits for the lock."""
    while not await sql.fetchval(WAITERS):
        await asyncio.sleep(0)


async def test_writers_notify_only_while_the_lock_is_held(database: str, pool: Pool, sql: Connection) -> None:
    async with wakeup_lock(database) as (lock, changed):
        writer = await connect(database, application_name="writer")
        listener = await connect(database, application_name="listener")
        notifications: list[object] = []
        marked = asyncio.Event()
        await listener.add_listener("rowcast", lambda *_: notifications.append(None))
        await listener.add_listener("mark", lambda *_: marked.set())

        async def notifications_of_a_write() -> int:
            notifications.clear()
            marked.clear()
            await writer.execute(WRITE, 1)
            await writer.execute("notify mark")
            await marked.wait()
            return len(notifications)

        assert 0 == await notifications_of_a_write()
        lock.want(True)
        await changed.wait()
        assert lock.held
        assert 1 == await notifications_of_a_write()
        changed.clear()
        lock.want(False)
        await changed.wait()
        assert not lock.held
        while await sql.fetchval("select count(*) from pg_locks where locktype = 'advisory'"):
            await asyncio.sleep(0)
        assert 0 == await notifications_of_a_write()
        await listener.close()
        await writer.close()


async def test_the_lock_is_granted_after_the_last_silent_writer_and_new_writers_notify_meanwhile(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with wakeup_lock(database) as (lock, changed):
        silent = sql.transaction()
        await silent.start()
        await sql.execute(WRITE, 1)
        async with pool.acquire() as other:
            lock.want(True)
            await until_requested(other)  # type: ignore[arg-type]
            assert await other.fetchval("select rowcast.must_ring()")
            assert not lock.held
            await silent.commit()
            await changed.wait()
            assert lock.held


async def test_a_lock_that_is_no_longer_wanted_leaves_the_queue(database: str, pool: Pool, sql: Connection) -> None:
    async with wakeup_lock(database) as (lock, _):
        silent = sql.transaction()
        await silent.start()
        await sql.execute(WRITE, 1)
        lock.want(True)
        async with pool.acquire() as other:
            await until_requested(other)  # type: ignore[arg-type]
            lock.want(False)
            while await other.fetchval(WAITERS):
                await asyncio.sleep(0)
            assert not await other.fetchval("select rowcast.must_ring()")
        await silent.rollback()


async def test_a_lock_whose_connection_breaks_is_reported_lost_and_taken_again(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with wakeup_lock(database) as (lock, changed):
        lock.want(True)
        await changed.wait()
        changed.clear()
        await sql.execute(KILL)
        await changed.wait()
        while not lock.held:
            changed.clear()
            await changed.wait()
        assert await sql.fetchval("select rowcast.must_ring()")


async def test_a_session_with_rowcast_ring_off_neither_notifies_nor_shares_the_lock(
    database: str, sql: Connection
) -> None:
    await sql.execute("set rowcast.ring = off")
    async with sql.transaction():
        assert not await sql.fetchval("select rowcast.must_ring()")
        assert 0 == await sql.fetchval("select count(*) from pg_locks where locktype = 'advisory'")


def leader_state() -> State | None:
    """The leader's state according to the metric."""
    states = {state: REGISTRY.get_sample_value("rowcast_leader_state", {"state": state.value}) for state in State}
    assert sum(value or 0 for value in states.values()) <= 1
    return next((state for state, value in states.items() if value), None)


async def until(state: State) -> None:
    while leader_state() is not state:
        await asyncio.sleep(0)


@pytest.fixture
def easily_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Low rates, so that any machine can produce a rush."""
    monkeypatch.setattr(adaptive_polling, "BUSY_RATE", 20.0)
    monkeypatch.setattr(adaptive_polling, "CALM_RATE", 5.0)


@asynccontextmanager
async def leader_without_safety_poll(database: str, pool: Pool) -> AsyncIterator[None]:
    """A leader that polls only while awake: asleep, it relies on notifications."""
    opening = partial(connect, database, server_settings=SESSION)
    events = asyncio.Event()
    notifier = Notifier(partial(opening, application_name="listener"), {"rowcast": events})
    sequencer = Sequencer(
        partial(opening, application_name="sequencer"), pool, events, asyncio.Event(), poll_every=NEVER
    )
    tasks = [asyncio.create_task(notifier.run()), asyncio.create_task(sequencer.run())]
    try:
        await notifier.listening.wait()
        await sequencer.leading.wait()
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.usefixtures("easily_awake")
async def test_an_idle_leader_falls_asleep_and_a_rush_of_writes_keeps_it_awake(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader_without_safety_poll(database, pool):
        await until(State.ASLEEP)
        assert await sql.fetchval("select rowcast.must_ring()")
        enough = asyncio.Event()
        rush = asyncio.create_task(_rush(database, enough))
        await until(State.AWAKE)
        while await sql.fetchval("select rowcast.must_ring()"):
            await asyncio.sleep(0)
        enough.set()
        await rush
        await until(State.ASLEEP)
        await until_numbered(pool)
    assert leader_state() is None


async def _rush(database: str, enough: asyncio.Event) -> None:
    """Write as fast as possible until `enough`."""
    writer = await connect(database, application_name="writer")
    while not enough.is_set():
        await writer.execute(WRITE, 1)
    await writer.close()


@pytest.mark.usefixtures("easily_awake")
async def test_no_wakeup_is_lost_under_random_rushes_pauses_and_long_transactions(database: str, pool: Pool) -> None:
    chance = random.Random(20261121)
    async with leader_without_safety_poll(database, pool):
        writers = [await connect(database, application_name="writer") for _ in range(3)]
        seen = set()
        for number in range(40):
            await asyncio.gather(*(_phase(writer, chance, row) for row, writer in enumerate(writers, 1)))
            async with asyncio.timeout(30):  # a lost wakeup would take forever
                await until_numbered(pool)
                seen.add(leader_state())
                if number % 4 == 3:
                    await until(State.ASLEEP)
        for writer in writers:
            await writer.close()
    assert State.AWAKE in seen


async def _phase(writer: Connection, chance: random.Random, row: int) -> None:
    """A rush, a single write, a transaction that stays open for a while, or one that is rolled back."""
    await asyncio.sleep(chance.choice([0, chance.uniform(0, 0.12)]))
    match chance.randrange(4):
        case 0:
            for _ in range(chance.randrange(200)):
                await writer.execute(WRITE, row)
        case 1:
            await writer.execute(WRITE, row)
        case 2:
            async with writer.transaction():
                await writer.execute(WRITE, row)
                await asyncio.sleep(chance.uniform(0, 0.2))
        case _:
            transaction = writer.transaction()
            await transaction.start()
            await writer.execute(WRITE, row)
            await asyncio.sleep(chance.uniform(0, 0.1))
            await transaction.rollback()


async def test_the_lock_has_the_same_number_in_the_triggers(sql: Connection) -> None:
    source = await sql.fetchval("select prosrc from pg_proc where oid = 'rowcast.must_ring()'::regprocedure")
    assert f"({WAKEUP_LOCK})" in source


async def test_a_leader_ignores_its_own_notifications(database: str, pool: Pool, sql: Connection) -> None:
    opening = partial(connect, database, server_settings=SESSION)
    own_notified, other_notified, numbered = asyncio.Event(), asyncio.Event(), asyncio.Event()
    sequencer = Sequencer(partial(opening, application_name="sequencer"), pool, asyncio.Event(), numbered)
    verdicts: list[bool] = []

    def is_own(pid: int) -> bool:
        verdicts.append(sequencer.is_own_notification(pid))
        return verdicts[-1]

    own = Notifier(partial(opening, application_name="own"), {"rowcast_log": own_notified}, is_own=is_own)
    other = Notifier(partial(opening, application_name="other"), {"rowcast_log": other_notified})
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(work) for work in (own.run(), other.run(), sequencer.run())]
        await own.listening.wait()
        await other.listening.wait()
        await sequencer.leading.wait()
        await sql.execute(query("share_follower_lock"), FOLLOWER_LOCK)
        own_notified.clear()
        other_notified.clear()
        await sql.execute(WRITE, 1)
        await other_notified.wait()
        assert numbered.is_set()
        while not verdicts:
            await asyncio.sleep(0)
        assert [True] == verdicts
        assert not own_notified.is_set()
        await sql.execute("notify rowcast_log")  # as another leader would
        await own_notified.wait()
        for task in tasks:
            task.cancel()


async def test_followers_are_notified_before_the_leader_delivers_to_its_own_clients(
    database: str, pool: Pool, sql: Connection
) -> None:
    listening, notified, ended = threading.Event(), threading.Event(), threading.Event()

    async def follow() -> None:
        connection = await connect(database, application_name="follower")
        await connection.add_listener("rowcast_log", lambda *_: notified.set())
        await connection.execute(query("share_follower_lock"), FOLLOWER_LOCK)
        listening.set()
        while not ended.is_set():
            await connection.execute("select 1")
        await connection.close()

    delivering, in_time = asyncio.Event(), list[bool]()

    def offer(*_: object) -> None:
        """While this process delivers, nothing else of it runs."""
        if delivering.is_set():
            in_time.append(notified.wait(10))

    async with leader(database, pool, offer=offer) as sequencer:
        follower = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(follow())))
        try:
            await asyncio.to_thread(listening.wait)
            await sql.execute(WRITE, 1)  # after which the leader has a connection for it
            await asyncio.to_thread(notified.wait)
            while not sequencer._readers_due._waiters:  # it may still wait for the answer of Postgres
                await asyncio.sleep(0)
            notified.clear()
            delivering.set()
            await sql.execute(WRITE, 1)
            await until_numbered(pool)
        finally:
            ended.set()
            await follower
    assert [True] == in_time
