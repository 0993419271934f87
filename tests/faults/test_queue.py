"""The NOTIFY queue, which all databases of a cluster share: a daemon that hangs, and a listener that blocks it."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

from daemon.postgres.connect import Connection
from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_TIMEOUT, Scenario, Server, newest_binaries, own_server, scenario, warnings_of
from tests.faults.oracle import Style
from tests.faults.results import Results
from tests.support.daemon import get

PAGES = 64  # the minimum; each notification below takes one page
FULL = "54000"
WATCH = 1.0  # seconds


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server with a small queue."""
    binaries = newest_binaries()
    assert 17 <= binaries.major
    async with own_server(binaries=binaries, settings={"max_notify_queue_pages": str(PAGES)}) as server:
        yield server


async def fill_queue(connection: Connection, share: float) -> float:
    """Send long notifications until this share of the queue is used; the share that is used then."""
    usage = 0.0
    for number in range(2 * PAGES):
        await connection.execute("select pg_notify('rowcast', $1)", f"{number}".ljust(7900))
        usage = await connection.fetchval("select pg_notification_queue_usage()")
        if usage >= share:
            break
    return usage


async def until_notify_needed(connection: Connection) -> None:
    """Wait until the leader is asleep, so that writers must notify it."""
    while not await connection.fetchval("select rowcast.must_ring()"):
        await asyncio.sleep(0.01)


async def watch(run: Scenario) -> None:
    """Act as systemd: kill and restart a daemon that does not feed the watchdog."""
    [supervised] = run.daemons
    while not run.stop.is_set():
        assert supervised.daemon
        try:
            async with asyncio.timeout(WATCH):
                await supervised.daemon.notices.wait_for("WATCHDOG=1")
        except TimeoutError:
            await supervised.stop(signal.SIGKILL)
            await supervised.start()


@pytest.mark.parametrize("watched", [True, False], ids=["watched", "unwatched"])
async def test_a_daemon_that_hangs_is_killed_before_writes_fail(
    server: Server, results: Results, watched: bool
) -> None:
    async with scenario(server, environment={"WATCHDOG_USEC": str(int(WATCH * 1e6))}) as run:
        await run.follow(2, pause=0.05)
        run.write(2, Style(pause=0.1))
        await run.received(20)
        notifying = await run.oracle.connect()
        await until_notify_needed(notifying)
        [supervised] = run.daemons
        assert supervised.daemon
        hanging = supervised.daemon.process
        began = time.monotonic()
        os.kill(hanging.pid, signal.SIGSTOP)
        usage = await fill_queue(notifying, 0.6)
        if not watched:
            with pytest.raises(asyncpg.ProgramLimitExceededError):
                await fill_queue(notifying, 2.0)
            while not run.oracle.errors[FULL]:
                await asyncio.sleep(0.01)
            results.caught("12", "no watchdog", f"writes fail with {FULL}")
            os.kill(hanging.pid, signal.SIGCONT)
            await notifying.close()
            return
        watching = run.tasks.create_task(watch(run))
        while supervised.daemon is None or supervised.daemon.process is hanging:
            await asyncio.sleep(0.01)
        freed = time.monotonic() - began
        await fill_queue(notifying, 0.6)
        await notifying.close()
        await run.recovered()
        assert CLEAN == await run.verdict()
        await watching
        assert {} == dict(run.oracle.errors)
        results.held(
            "12",
            "the daemon is stopped, and its listener stops reading",
            f"SIGSTOP, {PAGES} pages of queue (PostgreSQL {server.binaries.version}), filled to 60 "
            f"% twice; a supervisor "
            "that kills a process that does not feed the watchdog, as systemd does",
            "no write failed; the clients resumed and missed nothing",
            f"watchdog of {WATCH:g} s (default 15): served again after {freed:.1f} s; the queue was {usage:.0%} full",
            run.n,
        )


async def queue_usage(run: Scenario) -> float:
    """The usage according to the daemon's metric."""
    assert run.daemons[0].daemon
    _, page = await get(f"{run.daemons[0].daemon.http}/metrics")
    [line] = [line for line in page.splitlines() if line.startswith("rowcast_queue_usage ")]
    return float(line.split()[1])


@pytest.mark.parametrize("mutants", [[], ["let_writers_notify"], ["no_queue_usage_query"]])
async def test_a_full_notify_queue_stops_no_writer_and_empties_as_soon_as_its_blocker_is_gone(
    server: Server, results: Results, mutants: list[str]
) -> None:
    async with scenario(server, mutants=mutants, environment={"ROWCAST_BEAT_LIMIT": "4"}) as run:
        await run.follow(2)
        [supervised] = run.daemons
        blocker = await run.oracle.connect()
        await blocker.execute("listen elsewhere")
        await blocker.execute("begin; select 1")
        notifying = await run.oracle.connect()
        await until_notify_needed(notifying)
        await fill_queue(notifying, 0.6)
        if "no_queue_usage_query" not in mutants:
            while (alarm := await queue_usage(run)) < 0.5:
                await asyncio.sleep(0.05)
        with pytest.raises(asyncpg.ProgramLimitExceededError):
            await fill_queue(notifying, 2.0)
        if "let_writers_notify" in mutants:
            with pytest.raises(TimeoutError):
                await run.recovered(within=MUTANT_TIMEOUT)
            results.caught("13", "let_writers_notify", "writes fail as long as the queue is full")
            await blocker.close()
            await notifying.close()
            return
        began = time.monotonic()
        await supervised.logged("notify_blocked")
        await run.recovered()
        served = time.monotonic() - began
        [warning] = await warnings_of(supervised)
        assert f"process {blocker.get_server_pid()}" in warning
        await blocker.close()
        await notifying.close()
        began = time.monotonic()
        if mutants:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(MUTANT_TIMEOUT):
                    await supervised.logged("notify_unblocked")
            results.caught("13", "no_queue_usage_query", "the queue stays full after the blocker has gone")
            await server.fetchval("select pg_notification_queue_usage()")
            return
        await supervised.logged("notify_unblocked")
        healed = time.monotonic() - began
        assert CLEAN == await run.verdict()
        results.held(
            "13",
            "the queue of NOTIFY is full",
            f"a listener that is idle in a transaction, {PAGES} pages (PostgreSQL {server.binaries.version})",
            "the metric shows it from 50 % on; once it is full, the daemon says so, stays ready, polls, and lets "
            "nobody notify, so writes succeed and are delivered; it empties when the blocker has gone",
            f"the metric said {alarm:.0%} before it was full; writes succeeded {served:.1f} s after it was; "
            f"notifications passed {healed:.1f} s after the blocker went",
            run.n,
        )
