"""The queue of NOTIFY, which all databases of a cluster share: a daemon that hangs, and a listener that blocks."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator

import asyncpg
import pytest

from daemon.postgres.connect import Connection
from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_NET, Server, Stage, newest_binaries, own_server, stage
from tests.faults.oracle import Style
from tests.faults.results import Results
from tests.support.daemon import get

PAGES = 64  # the least; each of the notes below takes one
FULL = "54000"
WATCH = 1.0  # seconds


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server whose queue is soon full."""
    binaries = newest_binaries()
    assert 17 <= binaries.major
    async with own_server(binaries=binaries, settings={"max_notify_queue_pages": str(PAGES)}) as server:
        yield server


async def ring_for(connection: Connection, share: float) -> float:
    """Send long notes until so much of the queue is taken, or it is full; how much was."""
    usage = 0.0
    for number in range(2 * PAGES):
        await connection.execute("select pg_notify('rowcast', $1)", f"{number}".ljust(7900))
        usage = await connection.fetchval("select pg_notification_queue_usage()")
        if usage >= share:
            break
    return usage


async def rung_for(connection: Connection) -> None:
    """Wait until the daemon is asleep, so that writers have to ring."""
    while not await connection.fetchval("select rowcast.must_ring()"):
        await asyncio.sleep(0.01)


async def watch(play: Stage) -> None:
    """What systemd does: a daemon that does not say that it lives is killed, and started again."""
    [supervised] = play.daemons
    while not play.stop.is_set():
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
    async with stage(server, environment={"WATCHDOG_USEC": str(int(WATCH * 1e6))}) as play:
        await play.follow(2, pause=0.05)
        play.write(2, Style(pause=0.1))
        await play.heard(20)
        ringing = await play.oracle.connect()
        await rung_for(ringing)
        [supervised] = play.daemons
        assert supervised.daemon
        hanging = supervised.daemon.process
        began = time.monotonic()
        os.kill(hanging.pid, signal.SIGSTOP)
        usage = await ring_for(ringing, 0.6)
        if not watched:
            with pytest.raises(asyncpg.ProgramLimitExceededError):
                await ring_for(ringing, 2.0)
            while not play.oracle.errors[FULL]:
                await asyncio.sleep(0.01)
            results.caught("12", "no watchdog", f"writes fail with {FULL}")
            os.kill(hanging.pid, signal.SIGCONT)
            await ringing.close()
            return
        watching = play.tasks.create_task(watch(play))
        while supervised.daemon is None or supervised.daemon.process is hanging:
            await asyncio.sleep(0.01)
        freed = time.monotonic() - began
        await ring_for(ringing, 0.6)
        await ringing.close()
        await play.recovered()
        assert CLEAN == await play.verdict()
        await watching
        assert {} == dict(play.oracle.errors)
        results.held(
            "12",
            "the daemon is stopped, and its listener stops reading",
            f"SIGSTOP, {PAGES} pages of queue (PostgreSQL {server.binaries.version}), filled to 60 "
            f"% twice; a supervisor "
            "that kills a process that does not feed the watchdog, as systemd does",
            "no write failed; the clients resumed and missed nothing",
            f"watchdog of {WATCH:g} s (default 15): served again after {freed:.1f} s; the queue was {usage:.0%} full",
            play.n,
        )


async def queue_usage(play: Stage) -> float:
    """What the daemon's metric says."""
    assert play.daemons[0].daemon
    _, page = await get(f"{play.daemons[0].daemon.http}/metrics")
    [line] = [line for line in page.splitlines() if line.startswith("rowcast_queue_usage ")]
    return float(line.split()[1])


@pytest.mark.parametrize("mutants", [[], ["no_usage"]])
async def test_a_blocked_notify_queue_empties_as_soon_as_the_blocker_is_gone(
    server: Server, results: Results, mutants: list[str]
) -> None:
    async with stage(server, mutants=mutants) as play:
        await play.follow(2)
        blocker = await play.oracle.connect()
        await blocker.execute("listen elsewhere")
        await blocker.execute("begin; select 1")
        ringing = await play.oracle.connect()
        await rung_for(ringing)
        await ring_for(ringing, 0.6)
        if not mutants:
            while (alarm := await queue_usage(play)) < 0.5:
                await asyncio.sleep(0.05)
        with pytest.raises(asyncpg.ProgramLimitExceededError):
            await ring_for(ringing, 2.0)
        await blocker.close()
        await ringing.close()
        began = time.monotonic()
        if mutants:
            with pytest.raises(TimeoutError):
                await play.recovered(within=MUTANT_NET)
            results.caught("13", "no_usage", "writes keep failing after the blocker has gone")
            await server.fetchval("select pg_notification_queue_usage()")
            return
        await play.recovered()
        healed = time.monotonic() - began
        assert CLEAN == await play.verdict()
        results.held(
            "13",
            "the queue of NOTIFY is full",
            f"a listener that is idle in a transaction, {PAGES} pages (PostgreSQL {server.binaries.version})",
            "the metric shows it from 50 % on; it recovers when the blocker has gone. Until then writes fail: "
            "Postgres does that, and Rowcast cannot prevent it",
            f"the metric said {alarm:.0%} before it was full; healed {healed:.1f} s after the blocker went",
            play.n,
        )
