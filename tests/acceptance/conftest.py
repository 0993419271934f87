from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, daemon_process


@pytest.fixture
async def chat(sql: Connection) -> Chat:
    return await Chat.begin(sql)


@pytest.fixture
async def daemon(database: str, chat: Chat) -> AsyncIterator[Daemon]:
    async with daemon_process(database) as process:
        yield process
