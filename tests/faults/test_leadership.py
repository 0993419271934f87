"""Numbering is disturbed: a leader hangs, locks are usurped, nothing can be written, an event cannot be numbered."""

import asyncio
import secrets
import signal
import time
from collections.abc import Awaitable, Callable

import asyncpg
import pytest

from daemon.log.sequencer import FOLLOWER_LOCK
from daemon.log.wakeup_lock import WAKEUP_LOCK
from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_TIMEOUT, TIMEOUT, Scenario, by_form, leader_of, not_ready, ready, scenario
from tests.faults.results import Results

LOCKS = 0x526F7763617374, FOLLOWER_LOCK, WAKEUP_LOCK
LONG_USER = "(select string_agg(md5(random()::text), '') from generate_series(1, 200))"
END_CONNECTION = "select pg_terminate_backend(l.backend_pid) from rowcast.lease as l"
TAKE_LEASE = (
    "update rowcast.lease set nonce = gen_random_uuid(), expires_at = clock_timestamp(), xid = pg_current_xact_id()"
)
UNNUMBERABLE = f"""
insert into rowcast.events (watch, topic, kind, key, grants)
select w.id, 'nobody', 'insert', '{{"id": "1"}}', jsonb_build_object('user', {LONG_USER})
from rowcast.watched as w where w.table_name = 'messages'
"""


async def test_a_stranger_who_holds_every_public_lock_stops_nobody(durable: str, results: Results) -> None:
    role, password = f"stranger_{secrets.token_hex(4)}", secrets.token_hex(8)
    async with scenario(durable, daemons=2) as run:
        await run.oracle.execute(f"create role {role} login password '{password}'")
        strangers = [await asyncpg.connect(durable, user=role, password=password) for _ in LOCKS]
        holding = [
            asyncio.create_task(stranger.execute("select pg_advisory_lock($1)", lock))
            for stranger, lock in zip(strangers, LOCKS, strict=True)
        ]
        leading = leader_of(run)
        await run.follow(2, url=run.daemons[1 - leading].url)
        run.write(3)
        await run.received(50)
        await run.daemons[leading].stop(signal.SIGKILL)
        recovery = await run.recovered()
        await run.daemons[leading].start()
        assert CLEAN == await run.verdict()
        for task, stranger in zip(holding, strangers, strict=True):
            task.cancel()
            stranger.terminate()
        await asyncio.gather(*holding, return_exceptions=True)
        await run.oracle.execute(f"drop role {role}")
        results.held(
            "31 (locks)",
            "a role that may only connect takes every advisory lock that Rowcast uses, or used",
            "held while events are numbered, the leader is killed, and a daemon starts",
            "nothing lost; the other daemon leads; the new one starts; the lease cannot be touched",
            f"from the kill until all are served {recovery:.2f} s",
            run.n,
        )


@pytest.mark.parametrize("mutant", [None, "no_expiry"])
async def test_a_leader_that_is_stopped_is_replaced_and_numbers_nothing_when_it_goes_on(
    durable: str, results: Results, mutant: str | None
) -> None:
    async with scenario(durable, daemons=2, mutants=[mutant] if mutant else []) as run:
        leading = leader_of(run)
        stopped, other = run.daemons[leading], run.daemons[1 - leading]
        others = await run.follow(2, url=other.url)
        [theirs] = await run.follow(1, url=stopped.url)
        run.write(3)
        await run.received(20)
        assert stopped.daemon
        stopped.daemon.process.send_signal(signal.SIGSTOP)
        try:
            if mutant == "no_expiry":
                with pytest.raises(TimeoutError):
                    await run.recovered(others, within=15)
                results.caught("31 (stopped)", mutant, "nothing is delivered while the leader is stopped")
                return
            recovery = await run.recovered(others)
        finally:
            stopped.daemon.process.send_signal(signal.SIGCONT)
        await run.received(100, others[0])
        await run.received(100, theirs)
        verdict = await run.verdict(within=TIMEOUT)
        assert CLEAN == verdict
        results.held(
            "31 (stopped)",
            "the leader is stopped, without a watchdog",
            "SIGSTOP while others write, SIGCONT once another leads",
            "the other daemon leads when the lease has expired; the old leader finds that and numbers nothing",
            f"from the stop until all clients of the other are served {recovery:.2f} s (lease 8 s)",
            run.n,
        )


async def read_only(run: Scenario) -> Callable[[], Awaitable[None]]:
    """New connections cannot write, and there are no old ones. Returns what undoes it."""
    name = await run.oracle.connect()
    database = await name.fetchval("select current_database()")
    await name.execute(f"alter database {database} set default_transaction_read_only = on")
    await name.execute(
        "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()",
        database,
    )

    async def undo() -> None:
        await name.execute(f"alter database {database} reset default_transaction_read_only")
        await name.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = $1 and pid <> pg_backend_pid()",
            database,
        )
        await name.close()

    return undo


async def locked(run: Scenario) -> Callable[[], Awaitable[None]]:
    """Nobody can store the snapshot of a batch. Returns what undoes it."""
    connection = await run.oracle.connect()
    await connection.execute("begin; lock table rowcast.batches")
    return connection.close


@pytest.mark.parametrize("mutant", [None, "no_backlog"])
@pytest.mark.parametrize("fault", [read_only, locked])
async def test_while_no_event_can_be_numbered_no_daemon_is_ready(
    durable: str,
    results: Results,
    fault: Callable[[Scenario], Awaitable[Callable[[], Awaitable[None]]]],
    mutant: str | None,
) -> None:
    async with scenario(durable, daemons=2, mutants=[mutant] if mutant else []) as run:
        await run.follow(2)
        run.write(2)
        await run.received(20)
        undo = await fault(run)
        if fault is locked:
            await run.committed(5)
        began = time.monotonic()
        try:
            async with asyncio.timeout(14 if mutant else TIMEOUT):
                reasons = [await not_ready(daemon) for daemon in run.daemons]
                while not all(checker.stale for checker in run.checkers):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            assert mutant
            results.caught(f"31 ({fault.__name__})", mutant, "the daemons stay ready")
            return
        finally:
            noticed = time.monotonic() - began
            await undo()
        assert not mutant
        if fault is read_only:
            assert ["ReadOnly"] * 2 == [reason.partition("ReadOnly")[1] for reason in reasons]
        for daemon in run.daemons:
            await ready(daemon)
        await run.recovered()
        assert CLEAN == await run.verdict()
        injected = {
            "read_only": "`default_transaction_read_only = on`; every connection is terminated",
            "locked": "a transaction holds `lock table rowcast.batches`",
        }[fault.__name__]
        results.held(
            f"31 ({fault.__name__})",
            "no event can be numbered",
            f"{injected}; two daemons",
            "neither daemon is ready, each says why; nothing lost afterwards",
            f"both not ready after {noticed:.1f} s",
            run.n,
        )


@pytest.mark.parametrize("mutant", [None, "no_halving"])
async def test_events_that_cannot_be_numbered_are_set_aside_and_the_others_flow(
    durable: str, results: Results, mutant: str | None
) -> None:
    async with scenario(durable, mutants=[mutant] if mutant else []) as run:
        await run.follow(2)
        run.write(3)
        await run.received(20)
        for _ in range(count := by_form(3, 30)):
            await run.oracle.execute(UNNUMBERABLE)
            if mutant:
                break
            await run.recovered()
        verdict = await run.verdict(within=MUTANT_TIMEOUT if mutant else TIMEOUT, resets={"limit"})
        if mutant:
            assert 0 < verdict.lost
            results.caught("33", mutant, verdict)
            return
        assert CLEAN == verdict
        await run.daemons[0].logged("event_set_aside", count)
        connection = await run.oracle.connect()
        assert count == await connection.fetchval("select count(*) from rowcast.dead_letters")
        await connection.close()
        results.held(
            "33",
            "events that cannot be numbered",
            f"a right of a user with 6,400 characters, more than an index can hold, {count} times while others write",
            "each becomes a dead letter and a `reset` with `limit`; the rest of its batch is delivered in order",
            "",
            run.n,
        )


@pytest.mark.parametrize("writes", [False, True], ids=["idle", "busy"])
async def test_thousands_of_leaders_exhaust_no_numbers(durable: str, results: Results, writes: bool) -> None:
    async with scenario(durable) as run:
        await run.follow(1)
        await run.recovered()
        connection = await run.oracle.connect()
        before = await connection.fetchval("select max(base) from rowcast.terms")
        changes = by_form(20, 3000)
        for number in range(changes):
            if writes:
                await run.oracle.mark(run.oracle.channels[0])
            terms = await connection.fetchval("select max(term) from rowcast.terms")
            await connection.execute(END_CONNECTION if writes and number % 2 else TAKE_LEASE)
            while terms == await connection.fetchval("select max(term) from rowcast.terms"):
                await asyncio.sleep(0.005)
        used = await connection.fetchval("select max(base) from rowcast.terms") - before
        await connection.close()
        assert CLEAN == await run.verdict()
        assert used < (changes + 1) * 2**21 if writes else used < 2**22
        results.held(
            f"34 ({'busy' if writes else 'idle'})",
            f"{changes:,} leaders in a row, {'each numbers an event' if writes else 'without an event to number'}",
            "the leader's lease is taken away, or its connection terminated",
            "nothing lost, no reset",
            f"{used:,} of 2^53 numbers used up",
            run.n,
        )
