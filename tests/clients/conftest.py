from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection, connect
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, daemon_process
from tests.support.postgres import Server

QUICK = {"ROWCAST_HEARTBEAT": "0.5", "ROWCAST_DRAIN_SECONDS": "1"}


@pytest.fixture(scope="package")
async def dsn(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="package")
async def daemon(dsn: str) -> AsyncIterator[Daemon]:
    """One daemon for all tests of the clients."""
    async with daemon_process(dsn, environment=QUICK) as process:
        yield process


@pytest.fixture
async def sql(dsn: str) -> AsyncIterator[Connection]:
    connection = await connect(dsn, application_name="test")
    yield connection
    await connection.close()


@pytest.fixture
async def chat(sql: Connection, daemon: Daemon) -> Chat:
    return await Chat.begin_again(sql, daemon)
