"""Postgres crashes, loses commits, or fails over: what clients have received is true, or they get a reset."""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator

import pytest

from tests.faults.checker import CLEAN, Delivered, Reset
from tests.faults.failover import HOW, failover
from tests.faults.harness import (
    MUTANT_TIMEOUT,
    SEED,
    TIMEOUT,
    Scenario,
    Server,
    by_form,
    median,
    own_server,
    report,
    scenario,
)
from tests.faults.oracle import Style
from tests.faults.proxy import Proxy
from tests.faults.results import Results

ASYNC_COMMIT = Style(pause=0.005, settings={"synchronous_commit": "off"})


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with own_server() as server:
        yield server


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGQUIT], ids=["kill -9", "immediate"])
async def test_every_commit_is_delivered_although_postgres_is_killed(
    server: Server, results: Results, how: signal.Signals
) -> None:
    chance = random.Random(SEED)
    recoveries: list[float] = []
    async with scenario(server) as run:
        await run.follow(by_form(8, 12))
        run.write(3)
        for _ in range(kills := by_form(3, 30)):
            await run.received(chance.randint(10, 100))
            began = time.monotonic()
            await server.crash(how)
            await server.start()
            await run.recovered()
            recoveries.append(time.monotonic() - began)
            report(f"{len(recoveries)}: {recoveries[-1]:.2f} s")
        verdict = await run.verdict(resets={"crash"})
        truth = await run.oracle.truth()
    assert CLEAN == verdict
    assert set() == run.oracle.acknowledged - truth.keys()
    resets = sum(isinstance(event, Reset) for checker in run.checkers for event in checker.history)
    name = "kill -9" if how == signal.SIGKILL else "SIGQUIT (`-m immediate`)"
    results.held(
        f"3 ({how.name})",
        f"{name} of Postgres",
        f"{kills} times after a random number of frames; writers commit synchronously, the numbering asynchronously",
        f"committed = delivered; {resets} resets, all `crash`; no number used twice",
        f"from the kill until all are served: p50 {median(recoveries):.2f} s, max {max(recoveries):.2f} s",
        run.n,
    )


async def test_a_leader_that_ignores_the_stored_snapshot_loses_what_a_crash_left_unnumbered(
    server: Server, results: Results
) -> None:
    await server.weaken("rowcast.open_term", "coalesce(batch.snapshot,", "coalesce(pg_current_snapshot(),")
    # Synchronously: asynchronous numbering can cause a reset, which would make up for the loss.
    async with scenario(server, environment={"ROWCAST_ORDER_COMMIT": "sync"}) as run:
        await run.follow(2)
        run.write(3)
        await run.received(20)
        assert run.daemons[0].daemon
        daemon = run.daemons[0].daemon.process
        daemon.send_signal(signal.SIGSTOP)  # so that some writes exist that no leader has seen
        await server.crash()
        await server.start()
        await run.committed(20)
        daemon.send_signal(signal.SIGCONT)
        await run.daemons[0].logged("leader_elected", 2)
        verdict = await run.verdict(within=MUTANT_TIMEOUT)
    assert 0 < verdict.lost
    for how in ("SIGKILL", "SIGQUIT"):
        results.caught(f"3 ({how})", "the stored snapshot is not used", verdict)


async def crash_and_undo(server: Server, run: Scenario, rounds: int) -> None:
    """Crash so that the last asynchronous commits are undone which clients have already received."""
    for _ in range(rounds):
        run.write(2, ASYNC_COMMIT)
        await run.received(20)
        await server.suspend("walwriter")
        await run.received(60)
        await server.crash()
        await server.start()
        await run.recovered()
    await run.recovered()


def undone(run: Scenario, truth: dict[str, object]) -> int:
    """How many changes clients have received that are not committed."""
    return sum(
        isinstance(event, Delivered) and event.token not in truth
        for checker in run.checkers
        for event in checker.history
    )


async def test_changes_undone_by_a_crash_are_followed_by_a_reset_for_every_client(
    server: Server, results: Results
) -> None:
    async with scenario(server) as run:
        await run.follow(4)
        await crash_and_undo(server, run, rounds := by_form(2, 20))
        verdict = await run.verdict(resets={"crash"})
        gone = undone(run, dict(await run.oracle.truth()))
    assert CLEAN == verdict
    assert 0 < gone
    results.held(
        "4 (async)",
        "kill -9 of Postgres, writers with `synchronous_commit = off`",
        f"the WAL writer is stopped before the crash, {rounds} times",
        "clients that received what was undone got `reset` with `crash`; no number was used for two changes",
        f"{gone} changes sent and undone by the crash",
        run.n,
    )


async def test_without_continuity_a_crash_leaves_clients_with_phantom_changes(
    server: Server, results: Results
) -> None:
    async with scenario(server, mutants=["no_continuity"]) as run:
        await run.follow(2)
        run.write(2, ASYNC_COMMIT)
        await run.received(20)
        await server.suspend("walwriter")
        await run.received(60)
        await server.crash()
        await server.start()
        await run.committed(100)
        verdict = await run.verdict(resets={"crash"}, within=MUTANT_TIMEOUT)
    assert 0 < verdict.phantom
    results.caught("4 (async)", "no_continuity", verdict)


async def test_with_synchronous_numbering_no_delivered_change_is_undone(server: Server, results: Results) -> None:
    async with scenario(server, environment={"ROWCAST_ORDER_COMMIT": "sync"}) as run:
        await run.follow(4)
        await crash_and_undo(server, run, rounds := by_form(2, 20))
        verdict = await run.verdict()
        gone = undone(run, dict(await run.oracle.truth()))
    assert (CLEAN, 0) == (verdict, gone)
    results.held(
        "4 (sync)",
        "the same with `ROWCAST_ORDER_COMMIT=sync`",
        f"likewise, {rounds} times",
        "no phantom and no reset",
        "",
        run.n,
    )
    results.caught("4 (sync)", "ROWCAST_ORDER_COMMIT=async", "see row 4 (async): the clients are reset")


@pytest.mark.parametrize("clean", [True, False], ids=["unchanged", "without epochs and jumps"])
async def test_failover_to_a_standby_resets_every_client_and_skips_nothing_silently(
    server: Server, results: Results, clean: bool
) -> None:
    if not clean:
        await server.weaken("rowcast.open_term", "newest + rowcast.term_jump(lease.renewed_at)", "newest")
        await server.weaken("rowcast.open_term", "known is null or", "true or known is null or")
        await server.weaken("rowcast.open_term", "left(pg_walfile_name(pg_current_wal_lsn()), 8)", "'timeline'")
    async with Proxy(server.socket).serving() as proxy, scenario(server, through=proxy) as run:
        [daemon] = run.daemons
        async with failover(server, proxy, run, daemon.url, by_form(6, 50)) as failed:
            if clean:
                await daemon.logged("leader_elected", 2)
            failed.let_return()
            await (run.recovered() if clean else run.committed(100))
            recovery = failed.seconds
            verdict = await run.verdict(resets={"epoch"}, within=TIMEOUT if clean else MUTANT_TIMEOUT)
            lost, resets = await failed.lost(), failed.resets()
    if not clean:
        assert CLEAN != verdict
        results.caught("20", "epoch without the timeline, terms without a jump", verdict)
        return
    assert CLEAN == verdict
    assert 0 < lost
    assert 0 < min(resets)
    results.held(
        "20",
        "failover to a standby that lags",
        HOW,
        f"every client, connected or away, got `reset` with `epoch` for each topic: {len(resets)} of {len(resets)}",
        f"{lost} acknowledged writes were lost with the primary; from the kill until all are served {recovery:.2f} s",
        run.n,
    )


async def test_a_crash_that_undoes_changes_causes_a_reset_even_without_further_writes(server: Server) -> None:
    async with scenario(server) as run:
        await run.follow(2)
        await run.recovered()
        await run.oracle.execute("create table oracle.flushed ()")  # flushes every number before it
        await server.suspend("walwriter")
        run.write(1, ASYNC_COMMIT)
        await run.received(20)
        await run.stop_writers()
        await server.crash()
        await server.start()
        for checker in run.checkers:
            async with asyncio.timeout(TIMEOUT):
                while not any(isinstance(event, Reset) for event in checker.history):
                    await asyncio.sleep(0.01)
        assert CLEAN == await run.verdict(resets={"crash"})
