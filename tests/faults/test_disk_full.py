"""A disk is full: the one with the captured events, with the log, or with the WAL."""

import asyncio
import shutil
import time
from contextlib import suppress
from pathlib import Path

from daemon.postgres.errors import DRIVER_ERRORS
from tests.faults.checker import CLEAN, Reset
from tests.faults.harness import Scenario, Server, not_ready, own_server, ready, scenario
from tests.faults.oracle import Style
from tests.faults.results import Results
from tests.support.postgres import passable_directory, prepare_cluster
from tests.support.processes import until_it_ends
from tests.support.small_disk import SmallDisk, small_disk

DISK_FULL = "53100"
SIZE = 24  # megabytes
WAL_SIZE = 64
WRITERS = Style(pause=0.02)
TABLESPACE = """
do $$ declare segment text; begin
    for segment in select inhrelid::regclass from pg_inherits where inhparent = 'rowcast.{table}'::regclass loop
        execute format('alter table %s set tablespace small', segment);
    end loop;
end $$
"""


def owner_of(server: Server) -> tuple[int, int]:
    """The user and the group that the server runs as."""
    status = (server.directory / "postgres").stat()
    return status.st_uid, status.st_gid


async def move_to(server: Server, disk: SmallDisk, table: str) -> None:
    """Let the segments of a table of Rowcast be on this disk."""
    await server.fetchval(f"create tablespace small location '{disk.path}'")
    await server.fetchval(TABLESPACE.format(table=table))


async def failed_writes(run: Scenario, count: int) -> None:
    """Wait until so many writes have failed because the disk is full."""
    while run.oracle.errors[DISK_FULL] < count:
        await asyncio.sleep(0.01)


async def test_writes_fail_while_the_disk_of_the_events_is_full_and_nothing_is_lost(results: Results) -> None:
    async with own_server() as server:
        with small_disk(SIZE, owner_of(server)) as disk:
            await move_to(server, disk, "events")
            async with scenario(server) as run:
                await run.follow(2)
                run.write(2, WRITERS)
                await run.received(20)
                disk.fill()
                await failed_writes(run, 10)
                failed = run.oracle.errors[DISK_FULL]
                disk.free()
                healed = await run.recovered()
                assert CLEAN == await run.verdict()
                assert {DISK_FULL} == run.oracle.errors.keys()
                results.held(
                    "17 (events)",
                    "the disk with the captured events is full",
                    f"a tablespace on a tmpfs of {SIZE} MB, filled while others write",
                    f"writes to watched tables fail with {DISK_FULL}, as strict capture says; nothing lost, and "
                    "nothing to repair",
                    f"{failed} writes failed; all served {healed:.2f} s after there was room",
                    run.n,
                )
            await server.embedded.stop()  # before its disk goes


async def test_events_wait_while_the_disk_of_the_log_is_full_and_the_daemon_says_why(results: Results) -> None:
    async with own_server() as server:
        with small_disk(SIZE, owner_of(server)) as disk:
            await move_to(server, disk, "log")
            async with scenario(server) as run:
                await run.follow(2)
                run.write(2, WRITERS)
                await run.received(20)
                disk.fill()
                began = time.monotonic()
                reason = await not_ready(run.daemons[0])
                noticed = time.monotonic() - began
                assert DISK_FULL in reason
                disk.free()
                healed = await run.recovered()
                await ready(run.daemons[0])
                assert CLEAN == await run.verdict()
                assert {} == dict(run.oracle.errors)
                results.held(
                    "17 (log)",
                    "the disk with the log is full",
                    f"a tablespace on a tmpfs of {SIZE} MB, filled while others write",
                    "no write fails; the daemon is not ready and says why; nothing lost, and nothing to repair",
                    f"not ready {noticed:.1f} s after the disk was full; all served {healed:.2f} s after there was "
                    "room",
                    run.n,
                )
            await server.embedded.stop()  # before its disk goes


async def put_wal_on(disk: SmallDisk, cluster: Path) -> None:
    """Move the WAL of a stopped cluster to this disk."""
    wal = disk.path / "pg_wal"
    copying = await asyncio.create_subprocess_exec("cp", "-a", str(cluster / "pg_wal"), str(wal))
    assert 0 == await copying.wait()
    shutil.rmtree(cluster / "pg_wal")
    (cluster / "pg_wal").symlink_to(wal)


async def use_up_wal(server: Server) -> None:
    """Begin new files of the WAL until that fails."""
    with suppress(*DRIVER_ERRORS):
        while True:
            await server.fetchval("select pg_switch_wal()")
            await server.fetchval("select pg_logical_emit_message(true, 'fill', repeat('x', 1000))")


async def test_a_full_disk_of_the_wal_stops_postgres_and_nothing_is_lost(results: Results) -> None:
    with passable_directory() as directory:
        server = Server(directory)
        await prepare_cluster(directory, server.binaries)
        with small_disk(WAL_SIZE, owner_of(server)) as disk:
            await put_wal_on(disk, directory / "postgres")
            await server.start()
            try:
                async with scenario(server) as run:
                    await run.follow(2)
                    run.write(2, WRITERS)
                    await run.received(20)
                    with until_it_ends(server.embedded.pid):
                        disk.fill()
                        await use_up_wal(server)
                    await server.embedded.stop()
                    assert "PANIC" in (directory / "postgres.log").read_text()
                    disk.free()
                    await server.embedded.start()
                    healed = await run.recovered()
                    assert CLEAN == await run.verdict(resets=["crash"])
                    resets = sum(isinstance(event, Reset) for checker in run.checkers for event in checker.history)
                    results.held(
                        "17 (WAL)",
                        "the disk with the WAL is full",
                        f"`pg_wal` on a tmpfs of {WAL_SIZE} MB, filled while others write; Postgres stops with PANIC",
                        "committed = delivered once there is room and Postgres runs again; no number used twice",
                        f"{resets} resets; all served {healed:.2f} s after the start",
                        run.n,
                    )
            finally:
                await server.embedded.stop()
