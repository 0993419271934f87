"""A commit that hangs holds the lock of NOTIFY, which every transaction that has notified takes."""

import asyncio
import time

import asyncpg
import pytest

from tests.faults.checker import CLEAN
from tests.faults.harness import MUTANT_TIMEOUT, Scenario, own_server, percentile, scenario, warnings_of
from tests.faults.oracle import Style
from tests.faults.results import Results
from tests.support.daemon import get

LOCK_TIMEOUT = 0.5  # seconds
WRITERS = Style(pause=0.05, settings={"lock_timeout": f"{LOCK_TIMEOUT}s", "synchronous_commit": "local"})
LOCKED = "55P03"  # lock_not_available
WAITING_WRITERS = """
select count(*) from pg_locks as l join pg_stat_activity as a on a.pid = l.pid
where l.locktype = 'object' and not l.granted and a.application_name not like 'rowcast%'
"""


async def hung_commit(run: Scenario) -> tuple[int, "asyncio.Task[None]"]:
    """A transaction that has written and notified, and whose commit waits for a standby that does not exist."""
    await run.oracle.execute("create table if not exists oracle.elsewhere (id int)")
    connection = await run.oracle.connect(synchronous_commit="on")
    await connection.execute("begin; insert into oracle.elsewhere values (1); select pg_notify('elsewhere', '')")

    async def commit() -> None:
        try:
            await connection.execute("commit")
        except asyncpg.PostgresError:
            connection.terminate()

    return connection.get_server_pid(), run.tasks.create_task(commit())


async def waiters(run: Scenario) -> float:
    """The daemon's metric."""
    assert run.daemons[0].daemon
    _, page = await get(f"{run.daemons[0].daemon.http}/metrics")
    [line] = [line for line in page.splitlines() if line.startswith("rowcast_notify_waiters ")]
    return float(line.split()[1])


@pytest.mark.parametrize("mutants", [[], ["let_writers_notify"]])
async def test_a_commit_that_blocks_notify_stops_no_other_writer(results: Results, mutants: list[str]) -> None:
    async with (
        own_server(settings={"synchronous_commit": "local"}) as server,
        scenario(server, mutants=mutants, environment={"ROWCAST_BEAT_LIMIT": "4"}) as run,
    ):
        await run.follow(2)
        run.write(2, WRITERS)
        await run.received(20)
        await server.fetchval("alter system set synchronous_standby_names = 'nobody'")
        await server.fetchval("select pg_reload_conf()")
        pid, committing = await hung_commit(run)
        began = time.monotonic()
        if mutants:
            while run.oracle.errors[LOCKED] < 2:
                await asyncio.sleep(0.05)
            with pytest.raises(TimeoutError):
                await run.recovered(within=MUTANT_TIMEOUT)
            results.caught("14", "let_writers_notify", f"writes fail with {LOCKED} as long as the commit hangs")
            await server.fetchval("select pg_terminate_backend($1)", pid)
            await committing
            return
        await run.daemons[0].logged("notify_blocked")
        noticed = time.monotonic() - began
        [warning] = await warnings_of(run.daemons[0])
        assert f"process {pid} of Postgres" in warning
        waiting = await waiters(run)
        while await server.fetchval("select rowcast.must_ring()"):
            await asyncio.sleep(0.05)
        while await server.fetchval(WAITING_WRITERS):  # those that had notified by then
            await asyncio.sleep(0.05)
        failed, before = run.oracle.errors[LOCKED], len(run.oracle.waits)
        took = await run.recovered()
        await run.committed(20)
        assert failed == run.oracle.errors[LOCKED]
        commits = run.oracle.waits[before:]
        assert not committing.done()
        await server.fetchval("select pg_terminate_backend($1)", pid)
        await committing
        await run.daemons[0].logged("notify_unblocked")
        assert CLEAN == await run.verdict()
        assert not run.oracle.errors.keys() - {LOCKED}
        assert [] == await warnings_of(run.daemons[0])
        results.held(
            "14",
            "a commit that hangs holds the lock of NOTIFY",
            "`synchronous_standby_names = 'nobody'`, and one transaction that has notified and waits for it; the "
            f"others commit locally, with a `lock_timeout` of {LOCK_TIMEOUT:g} s",
            "the daemon names the process, stays ready, polls, and lets nobody notify, so others commit and are "
            "delivered; nothing lost",
            f"noticed after {noticed:.1f} s, when {waiting:.0f} waited; {failed} writes had failed by then, none "
            f"afterwards: commits p99 {percentile(commits) * 1000:.0f} ms, all served in {took:.2f} s",
            run.n,
        )
