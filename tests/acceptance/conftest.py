from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.acceptance.samples import Samples
from tests.support.browser import running_browser
from tests.support.daemon import Daemon, daemon_process
from tests.support.postgres import Server


@pytest.fixture
async def chat(sql: Connection) -> Chat:
    return await Chat.begin(sql)


@pytest.fixture
async def daemon(database: str, chat: Chat) -> AsyncIterator[Daemon]:
    async with daemon_process(database) as process:
        yield process


@pytest.fixture(scope="package")
async def samples(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Samples]:
    """One `daemon up` for all tests of pages; each writes rows of its own."""
    async with Samples.serving(postgres, tmp_path_factory.mktemp("up")) as samples:
        yield samples


@pytest.fixture(scope="package")
async def browser() -> AsyncIterator[Browser]:
    async with running_browser() as browser:
        yield browser
