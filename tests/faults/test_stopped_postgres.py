"""Postgres is suspended under a daemon with clients: they stay connected, receive `stale`, and miss nothing."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import pytest

from daemon.core.change import Seq
from daemon.core.errors import LogUnavailable
from daemon.embedded.server import EmbeddedPostgres
from daemon.log import reader
from daemon.postgres.connect import open_pool
from tests.support.daemon import Client, Frame, daemon_process
from tests.support.postgres import chosen_binaries, passable_directory, prepare_cluster

ADA = "01JGQ4ZV8M0000000000000ADA"
TOPIC = f"user:{ADA}"


@asynccontextmanager
async def stopped(*pids: int) -> AsyncIterator[None]:
    """These processes are suspended inside the block."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(
                ProcessLookupError
            ):  # it was exiting when it was stopped, and its parent has already resumed
                os.kill(pid, signal.SIGCONT)


def family(pid: int) -> list[int]:
    """A process and its children."""
    return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedPostgres]:
    with passable_directory() as directory:
        await prepare_cluster(directory, chosen_binaries())
        async with EmbeddedPostgres(directory, binaries=chosen_binaries()) as server:
            await execute(
                server,
                f"""insert into chatgenius.users (id, auth0_id, email, username)
                    values ('{ADA}', 'a', 'a@example.com', 'ada');
                    insert into chatgenius.user_settings (user_id) values ('{ADA}')""",
            )
            yield server


async def execute(server: EmbeddedPostgres, statement: str) -> None:
    connection = await asyncpg.connect(server.dsn)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def say(server: EmbeddedPostgres, content: str) -> None:
    await execute(
        server,
        f"""update chatgenius.user_settings set preferences = '{{"said": "{content}"}}' where user_id = '{ADA}'""",
    )


async def next_frame(client: Client) -> Frame:
    """The next frame, including heartbeats."""
    frame: Frame = json.loads(await client.connection.recv())
    return frame


async def test_clients_of_a_stalled_database_receive_stale_stay_connected_and_miss_nothing(
    server: EmbeddedPostgres,
) -> None:
    async with daemon_process(server.dsn) as daemon, daemon.client(ADA) as client:
        await client.subscribe(TOPIC)
        await say(server, "before")
        [before] = await client.changes()
        async with stopped(*family(server.pid)):
            meanwhile = asyncio.create_task(say(server, "meanwhile"))
            while "stale" not in (frame := await next_frame(client)):
                assert "head" == frame["op"], frame  # a heartbeat that was due before that
            assert ("head", True) == (frame["op"], frame["stale"])
            assert str(before["seq"]) == frame["pos"].rpartition(":")[2]
            await client.say(op="ping")
            assert "pong" == (await client.next())["op"]
        await meanwhile
        frames: list[Frame] = []
        while {"head", "changes"} != {frame["op"] for frame in frames}:
            frames.append(await next_frame(client))
        assert not any("stale" in frame for frame in frames)
        [frame] = [frame for frame in frames if frame["op"] == "changes"]
        assert ["meanwhile"] == [change["record"]["preferences"]["said"] for change in frame["changes"]]
        await say(server, "after")
        assert ["after"] == [change["record"]["preferences"]["said"] for change in await client.changes()]


async def test_a_read_that_hangs_times_out_and_the_next_one_uses_another_connection(
    server: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = await open_pool(server.dsn, application_name="test", min_size=3, max_size=3)
    try:
        async with pool.acquire() as one, pool.acquire() as two, pool.acquire() as three:
            pids = [connection.get_server_pid() for connection in (one, two, three)]
        log = reader.PgLogReader(pool)
        async with stopped(*pids):
            with monkeypatch.context() as patch:
                patch.setattr(reader, "READ_TIMEOUT", 0.1)
                with pytest.raises(LogUnavailable):
                    await log.read(Seq(0), 10)
            assert [] == await log.read(Seq(0), 10)
            assert "" == (await log.head()).epoch
    finally:
        pool.terminate()


async def test_a_cancelled_query_does_not_block_the_next_one(server: EmbeddedPostgres) -> None:
    pool = await open_pool(server.dsn, application_name="test", max_size=1)
    try:
        async with pool.acquire() as connection:
            pid = connection.get_server_pid()
        log = reader.PgLogReader(pool)
        async with stopped(pid):
            query = asyncio.create_task(log.head())
            await asyncio.sleep(0)  # it has begun
            query.cancel()
            with pytest.raises(asyncio.CancelledError):
                await query
            assert "" == (await log.head()).epoch
    finally:
        pool.terminate()
