"""The log goes back in time: a dump or an old copy is put back, tables are truncated. Clients are told."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.faults.checker import CLEAN, Checker, Reset
from tests.faults.harness import MUTANT_TIMEOUT, Scenario, Server, own_server, scenario
from tests.faults.results import Results
from tests.support.postgres import replay

SCHEMAS = "rowcast", "chatgenius", "oracle"


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with own_server() as server:
        yield server


async def dump(server: Server) -> str:
    """A dump that replaces what it restores."""
    process = await asyncio.create_subprocess_exec(
        server.binaries.bindir / "pg_dump", "--dbname", server.dsn, *(f"--schema={name}" for name in SCHEMAS),
        stdout=asyncio.subprocess.PIPE, env=server.binaries.environment(),
    )  # fmt: skip
    text, _ = await process.communicate()
    assert 0 == process.returncode
    drop = f"drop schema {', '.join(SCHEMAS)} cascade;"
    return f"begin; set client_min_messages = warning; {drop}\n{text.decode()}\ncommit;"


async def restarted(run: Scenario) -> None:
    await run.daemons[0].start()
    await run.reconnected()


def resets(run: Scenario) -> list[str]:
    return [event.reason for checker in run.checkers for event in checker.history if isinstance(event, Reset)]


@pytest.mark.parametrize("mutant", [None, "no_look_at_the_log"])
@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
async def test_a_dump_restored_into_the_same_database_resets_every_client(
    server: Server, results: Results, running: bool, mutant: str | None
) -> None:
    async with scenario(server, mutants=[mutant] if mutant else []) as run:
        await run.follow(3)
        run.write(2)
        await run.received(40)
        await run.stop_writers()
        await run.recovered()
        backup = await dump(server)
        run.stop.clear()
        run.write(2)
        await run.received(60)
        await run.stop_writers()
        await run.recovered()
        if not running:
            await run.daemons[0].stop(signal.SIGTERM)
        await replay(server.dsn, backup)
        if not running:
            await restarted(run)
        run.stop.clear()
        run.write(2)
        await run.committed(40)
        verdict = await run.verdict(resets={"epoch"}, within=MUTANT_TIMEOUT if mutant else 60)
    number = f"32 ({'running' if running else 'stopped'})"
    if mutant:
        if running:
            assert CLEAN != verdict
            results.caught(number, mutant, verdict)
        return
    assert CLEAN == verdict
    assert len(run.checkers) * len(run.oracle.topics) <= len(resets(run))
    results.held(
        number,
        f"a dump is restored into the same database, the daemon {'runs' if running else 'is stopped'}",
        "schemas dropped and restored in one transaction, after more had been written and sent",
        f"every client got `reset` with `epoch` for each topic: {len(resets(run))}; no number names two changes",
        "",
        run.n,
    )


async def copy(source: Path, target: Path) -> None:
    process = await asyncio.create_subprocess_exec("cp", "-a", str(source), str(target))
    assert 0 == await process.wait()


@pytest.mark.parametrize("running", [True, False], ids=["running", "restarted"])
async def test_an_old_copy_of_the_data_directory_resets_every_client(
    server: Server, results: Results, running: bool
) -> None:
    cluster, kept = server.directory / "postgres", server.directory / "kept"
    async with scenario(server) as run:
        await run.follow(3)
        run.write(2)
        await run.received(40)
        await run.stop_writers()
        await run.recovered()
        if not running:
            await run.daemons[0].stop(signal.SIGTERM)
        await server.embedded.stop()
        await copy(cluster, kept)
        await server.start()
        if not running:
            await restarted(run)
        run.stop.clear()
        run.write(2)
        await run.received(60)
        await run.stop_writers()
        await run.recovered()
        if not running:
            await run.daemons[0].stop(signal.SIGTERM)
        await server.embedded.stop()
        shutil.rmtree(cluster)
        await copy(kept, cluster)
        await server.start()
        if not running:
            await restarted(run)
        run.stop.clear()
        run.write(2)
        await run.committed(40)
        verdict = await run.verdict(resets={"epoch"} if running else {"epoch", "crash"})
    assert CLEAN == verdict
    assert len(run.checkers) * len(run.oracle.topics) <= len(resets(run))
    results.held(
        f"32 (copy, {'running' if running else 'restarted'})",
        f"a cold copy of the data directory is put back; the daemon {'stays' if running else 'is restarted too'}",
        "copied while Postgres was stopped; put back after more had been written and sent",
        f"every client got `reset` for each topic: {len(resets(run))} ({', '.join(sorted(set(resets(run))))})",
        "",
        run.n,
    )


def was_reset(checker: Checker) -> bool:
    return any(isinstance(event, Reset) for event in checker.history)


@pytest.mark.parametrize("mutant", [None, "no_look_at_the_log"])
async def test_truncated_tables_reset_clients_that_are_connected_and_clients_that_are_away(
    server: Server, results: Results, mutant: str | None
) -> None:
    # Without the changes in memory, which a truncation does not reach.
    uncached = {"ROWCAST_RECENT_BYTES": "0"}
    async with scenario(server, mutants=[mutant] if mutant else [], environment=uncached) as run:
        here = [run.daemons[0].url]
        away = await run.follow(2, url=lambda: here[0]())  # noqa: PLW0108 - looked up at each call
        clients = await run.follow(2)
        run.write(2)
        await run.received(40)
        here[0] = lambda: "ws://127.0.0.1:9/v1"
        for checker in away:
            assert checker.connection is not None
            checker.connection.transport.abort()
        await run.received(60, clients[0])
        await run.stop_writers()
        await run.recovered(clients)
        await run.oracle.execute("truncate rowcast.events, rowcast.log")
        here[0] = run.daemons[0].url
        run.stop.clear()
        run.write(2)
        while not (mutant or all(map(was_reset, run.checkers))):  # the leader looks when it renews its lease
            await asyncio.sleep(0.05)
        verdict = await run.verdict(resets={"epoch", "crash"}, within=MUTANT_TIMEOUT if mutant else 60)
    if mutant:
        assert 0 < verdict.lost
        results.caught("32 (truncated)", mutant, verdict)
        return
    assert CLEAN == verdict
    results.held(
        "32 (truncated)",
        "`truncate rowcast.events, rowcast.log` by hand under a running daemon",
        "while two clients are connected and two are away",
        f"all clients got `reset`: {len(resets(run))} ({', '.join(sorted(set(resets(run))))})",
        "",
        run.n,
    )
