"""A daemon whose stderr is a pipe that nobody reads serves its clients all the same."""

import asyncio
import fcntl
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.acceptance.chat import Chat
from tests.support.daemon import SECRET, Daemon, Notices, clean_environment, free_port, get, start

PIPE_BYTES = 4096
EXIT_TIMEOUT = 20.0  # seconds


@asynccontextmanager
async def unread_daemon(database: str, workers: int) -> AsyncIterator[tuple[Daemon, int]]:
    """A daemon that is ready, and the end of its stderr that nobody reads."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    with tempfile.TemporaryDirectory() as home, Notices(Path(home, "notify")) as notices:
        port = free_port()
        process = await start(
            environment=clean_environment(
                DATABASE_URL=database,
                NOTIFY_SOCKET=str(notices.path),
                ROWCAST_SECRET=SECRET,
                ROWCAST_LISTEN=f"127.0.0.1:{port}",
                ROWCAST_LOG_FORMAT="json",
                ROWCAST_LOG_LEVEL="debug",
                ROWCAST_WORKERS=str(workers),
            ),
            directory=home,
            errors=writing,
        )
        os.close(writing)
        try:
            await notices.wait_for("READY=1")
            yield Daemon(process, ("127.0.0.1", port), Path(home), notices), reading
        finally:
            process.send_signal(signal.SIGKILL)
            await process.wait()
            os.close(reading)


async def dropped(daemon: Daemon) -> bool:
    """Has the process that answers dropped lines?"""
    _, page = await get(f"{daemon.http}/metrics")
    [line] = [line for line in page.splitlines() if line.startswith("rowcast_log_lines_dropped_total")]
    return float(line.split()[-1]) > 0


async def read_until(reading: int, text: bytes) -> bytes:
    found = b""
    while text not in found:
        found += await asyncio.to_thread(os.read, reading, 65536)
    return found


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_daemon_serves_and_stops_although_nobody_reads_its_log(
    database: str, chat: Chat, workers: int
) -> None:
    async with unread_daemon(database, workers) as (daemon, _):
        async with daemon.client(chat.ada) as client:
            await client.subscribe(chat.topic)
            while not await dropped(daemon):
                async with asyncio.TaskGroup() as group:
                    for _ in range(20):
                        group.create_task(connect_once(daemon, chat))
            await chat.say("served")
            assert "served" == (await client.changes())[0]["record"]["content"]
            assert 200 == (await get(f"{daemon.http}/readyz"))[0]
        async with asyncio.timeout(EXIT_TIMEOUT):
            assert 0 == await daemon.stop()


async def connect_once(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada):
        pass


async def test_a_log_that_is_read_again_says_how_many_lines_are_missing(database: str, chat: Chat) -> None:
    async with unread_daemon(database, 1) as (daemon, reading):
        while not await dropped(daemon):
            await connect_once(daemon, chat)
        text = await read_until(reading, b"log_lines_dropped")
        lines = [json.loads(line) for line in text.splitlines() if line.endswith(b"}}")]
        assert all(line["data"]["lines"] > 0 for line in lines if line["event"] == "log_lines_dropped")
        await connect_once(daemon, chat)
        await read_until(reading, b"client_connected")
