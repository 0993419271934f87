"""Fixtures for every test."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection, Pool, connect, open_pool
from tests.support.log import ROWS
from tests.support.postgres import FAST, Server, remove_prepared_clusters, running_server
from tests.support.preloaded import Forker

CANCEL_TIMEOUT = 60.0  # seconds


def pytest_configure() -> None:
    """Let the processes that tests start be interrupted and reloaded: those of a shell in the background, or of
    nohup(1), ignore that.
    """
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: tests wait for processes and timers half of their time."""
    cores = len(os.sched_getaffinity(0))
    return cores + min(cores, 4)


@pytest.fixture(autouse=True)
async def tasks() -> AsyncIterator[None]:
    """All tests of a process share an event loop: a task that a test has begun ends with the test."""
    loop, before = asyncio.get_running_loop(), asyncio.all_tasks()
    yield
    left = asyncio.all_tasks() - before - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        _, still_running = await asyncio.wait(left, timeout=CANCEL_TIMEOUT)
        assert not still_running, "these tasks ignore their cancellation"
    loop.set_exception_handler(None)


@pytest.fixture(scope="session", autouse=True)
async def shared() -> AsyncIterator[None]:
    """What tests share without asking for it ends with them."""
    yield
    await Forker.close_shared()
    remove_prepared_clusters()


@pytest.fixture(scope="session")
async def postgres() -> AsyncIterator[Server]:
    """One server for all tests of this process."""
    async with running_server(FAST) as server:
        yield server


@pytest.fixture
async def empty_database(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database with nothing in it."""
    async with postgres.database() as dsn:
        yield dsn


@pytest.fixture
async def database(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database with Rowcast's own schema and ChatGenius in it."""
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture
async def sql(database: str) -> AsyncIterator[Connection]:
    """A connection to `database`, as its owner."""
    connection = await connect(database, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture
async def pool(database: str) -> AsyncIterator[Pool]:
    """A pool of connections like the daemon's."""
    pool = await open_pool(database, application_name="test", max_size=5)
    yield pool
    await pool.close()


@pytest.fixture
async def rows(sql: Connection) -> None:
    """The watched table `app.rows` with eight rows, and an empty log."""
    await sql.execute(ROWS)
