"""Postgres dies, forgets, or is followed by a standby, under clients: what they were told is true, or taken back."""

import asyncio
import os
import random
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.faults.checker import CLEAN, Reset, Told
from tests.faults.harness import (
    MUTANT_NET,
    NET,
    NOWHERE,
    SEED,
    Server,
    Stage,
    middle,
    own_server,
    say,
    stage,
    times,
)
from tests.faults.oracle import Style
from tests.faults.proxy import Proxy
from tests.faults.results import Results
from tests.support.postgres import passable_directory

FORGETFUL = Style(pause=0.005, settings={"synchronous_commit": "off"})


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
    async with stage(server) as play:
        await play.follow(times(8, 12))
        play.write(3)
        for _ in range(kills := times(3, 30)):
            await play.heard(chance.randint(10, 100))
            began = time.monotonic()
            await server.crash(how)
            await server.start()
            await play.recovered()
            recoveries.append(time.monotonic() - began)
            say(f"{len(recoveries)}: {recoveries[-1]:.2f} s")
        verdict = await play.verdict(resets={"crash"})
        truth = await play.oracle.truth()
    assert CLEAN == verdict
    assert set() == play.oracle.acknowledged - truth.keys()
    resets = sum(isinstance(event, Reset) for checker in play.checkers for event in checker.history)
    name = "kill -9" if how == signal.SIGKILL else "SIGQUIT (`-m immediate`)"
    results.held(
        f"3 ({how.name})",
        f"{name} of Postgres",
        f"{kills} times after a random number of frames; writers commit synchronously, the numbering asynchronously",
        f"committed = delivered; {resets} resets, all `crash`; no number used twice",
        f"from the kill until all are served: p50 {middle(recoveries):.2f} s, max {max(recoveries):.2f} s",
        play.n,
    )


async def test_a_leader_that_ignores_the_stored_snapshot_loses_what_a_crash_left_unnumbered(
    server: Server, results: Results
) -> None:
    await server.weaken("rowcast.open_term", "coalesce(snapshot, '3:3:')", "pg_current_snapshot()")
    # Synchronously: a reset, which an asynchronous order may bring, would make the loss good.
    async with stage(server, environment={"ROWCAST_ORDER_COMMIT": "sync"}) as play:
        await play.follow(2)
        play.write(3)
        await play.heard(20)
        assert play.daemons[0].daemon
        daemon = play.daemons[0].daemon.process
        daemon.send_signal(signal.SIGSTOP)  # so that there is something which no leader has seen
        await server.crash()
        await server.start()
        await play.committed(20)
        daemon.send_signal(signal.SIGCONT)
        await play.daemons[0].logged("leader_elected", 2)
        verdict = await play.verdict(within=MUTANT_NET)
    assert 0 < verdict.lost
    for how in ("SIGKILL", "SIGQUIT"):
        results.caught(f"3 ({how})", "the stored snapshot is not used", verdict)


async def forgotten(server: Server, play: Stage, rounds: int) -> None:
    """Crashes that take back what the last moments committed asynchronously; clients were told of it."""
    for _ in range(rounds):
        play.write(2, FORGETFUL)
        await play.heard(20)
        await server.suspend("walwriter")
        await play.heard(60)
        await server.crash()
        await server.start()
        await play.recovered()
    await play.recovered()


def taken_back(play: Stage, truth: dict[str, object]) -> int:
    return sum(
        isinstance(event, Told) and event.token not in truth for checker in play.checkers for event in checker.history
    )


async def test_changes_undone_by_a_crash_are_followed_by_a_reset_for_every_client(
    server: Server, results: Results
) -> None:
    async with stage(server) as play:
        await play.follow(4)
        await forgotten(server, play, rounds := times(2, 20))
        verdict = await play.verdict(resets={"crash"})
        gone = taken_back(play, dict(await play.oracle.truth()))
    assert CLEAN == verdict
    assert 0 < gone
    results.held(
        "4 (async)",
        "kill -9 of Postgres, writers with `synchronous_commit = off`",
        f"the WAL writer is stopped before the crash, {rounds} times",
        "clients that received what was undone got `reset` with `crash`; no number was used for two changes",
        f"{gone} changes sent and undone by the crash",
        play.n,
    )


@pytest.mark.parametrize(("mutant", "far"), [("no_continuity", True), ("terms without a jump", False)])
async def test_without_terms_a_crash_leaves_clients_with_phantom_changes(
    server: Server, results: Results, mutant: str, far: bool
) -> None:
    if not far:
        await server.weaken("rowcast.open_term", "10000000", "0")
    async with stage(server, mutants=[mutant] if far else []) as play:
        await play.follow(2)
        play.write(2, FORGETFUL)
        await play.heard(20)
        await server.suspend("walwriter")
        await play.heard(60)
        await server.crash()
        await server.start()
        await play.committed(100)
        verdict = await play.verdict(resets={"crash"}, within=MUTANT_NET)
    assert 0 < verdict.phantom
    results.caught("4 (async)", mutant, verdict)


async def test_with_synchronous_numbering_no_delivered_change_is_undone(server: Server, results: Results) -> None:
    async with stage(server, environment={"ROWCAST_ORDER_COMMIT": "sync"}) as play:
        await play.follow(4)
        await forgotten(server, play, rounds := times(2, 20))
        verdict = await play.verdict()
        gone = taken_back(play, dict(await play.oracle.truth()))
    assert (CLEAN, 0) == (verdict, gone)
    results.held(
        "4 (sync)",
        "the same with `ROWCAST_ORDER_COMMIT=sync`",
        f"likewise, {rounds} times",
        "no phantom and no reset",
        "",
        play.n,
    )
    results.caught("4 (sync)", "ROWCAST_ORDER_COMMIT=async", "see row 4 (async): the clients are reset")


@asynccontextmanager
async def standby_of(server: Server) -> AsyncIterator[Server]:
    """A physical standby, which has stopped: whatever is written from now on it will never have."""
    with passable_directory() as directory:
        cluster = server.directory / "postgres"
        password = shutil.copy(server.directory / "postgres.password", directory)
        process = await asyncio.create_subprocess_exec(
            str(server.binaries.bindir / "pg_basebackup"),
            *("--pgdata", str(directory / "postgres"), "--write-recovery-conf", "--checkpoint=fast"),
            *("--host", str(server.socket.parent), "--username", "rowcast"),
            env=server.binaries.environment() | {"PGPASSWORD": Path(password).read_text()},
        )
        assert 0 == await process.wait()
        owner = cluster.stat()
        for path in (Path(password), directory / "postgres", *(directory / "postgres").rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        standby = Server(directory, binaries=server.binaries)
        try:
            yield standby
        finally:
            await standby.embedded.stop()


@pytest.mark.parametrize("clean", [True, False], ids=["as it is", "without epochs and jumps"])
async def test_failover_to_a_standby_resets_every_client_and_skips_nothing_silently(
    server: Server, results: Results, clean: bool
) -> None:
    if not clean:
        await server.weaken("rowcast.open_term", "10000000", "0")
        await server.weaken("rowcast.open_term", "left(pg_walfile_name(pg_current_wal_lsn()), 8)", "'timeline'")
    now = [server]
    async with Proxy(server.socket).serving() as proxy, stage(server, through=proxy) as play:
        play.oracle.move(lambda: now[0].dsn)
        here = [play.daemons[0].url]
        away = await play.follow(2, url=lambda: here[0]())  # noqa: PLW0108 - wherever it is then
        clients = [*await play.follow(times(6, 50)), *away]
        play.write(2)
        await play.heard(50)
        async with standby_of(server) as standby:
            await play.heard(100)
            here[0] = lambda: NOWHERE
            for checker in away:
                assert checker.line is not None
                checker.line.transport.abort()
            await play.heard(50, clients[0])
            began = time.monotonic()
            await server.crash()
            await standby.start()
            proxy.target, now[0] = standby.socket, standby
            assert await standby.fetchval("select pg_promote(true, 60)")
            if clean:
                await play.daemons[0].logged("leader_elected", 2)
            here[0] = play.daemons[0].url
            if clean:
                await play.recovered()
            else:
                await play.committed(100)
            recovery = time.monotonic() - began
            verdict = await play.verdict(resets={"epoch"}, within=NET if clean else MUTANT_NET)
            truth = await play.oracle.truth()
    if not clean:
        assert CLEAN != verdict
        results.caught("20", "epoch without the timeline, terms without a jump", verdict)
        return
    assert CLEAN == verdict
    assert 0 < len(play.oracle.acknowledged - truth.keys())
    resets = [
        sum(isinstance(event, Reset) and event.topic == topic for event in checker.history)
        for checker in clients
        for topic in checker.topics
    ]
    assert 0 < min(resets)
    results.held(
        "20",
        "failover to a standby that lags",
        "`pg_basebackup -R`; the standby is stopped, writes continue, the primary is killed, the standby is promoted",
        f"every client, connected or away, got `reset` with `epoch` for each topic: {len(resets)} of {len(resets)}",
        f"{len(play.oracle.acknowledged - truth.keys())} acknowledged writes were lost with the "
        f"primary; from the kill "
        f"until all are served {recovery:.2f} s",
        play.n,
    )


async def test_a_crash_that_undoes_changes_causes_a_reset_even_without_further_writes(server: Server) -> None:
    async with stage(server) as play:
        await play.follow(2)
        await play.recovered()
        await play.oracle.execute("create table oracle.flushed ()")  # and with it every number before
        await server.suspend("walwriter")
        play.write(1, FORGETFUL)
        await play.heard(20)
        await play.quiet()
        await server.crash()
        await server.start()
        for checker in play.checkers:
            async with asyncio.timeout(NET):
                while not any(isinstance(event, Reset) for event in checker.history):
                    await asyncio.sleep(0.01)
        assert CLEAN == await play.verdict(resets={"crash"})
