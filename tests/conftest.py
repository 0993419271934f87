"""Fixtures for every test."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

from daemon.embedded.server import EmbeddedPostgres
from daemon.postgres.connect import Connection, Pool, connect, open_pool
from daemon.schema import migrate
from tests.support.log import ROWS
from tests.support.postgres import FAST, Server, chosen_binaries, passable_directory


def ignore(line: str) -> None:
    """Discard the progress of a migration."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """One server for all tests of this process; not bound to an event loop."""
    with passable_directory() as directory:
        embedded = EmbeddedPostgres(directory, binaries=chosen_binaries(), settings=FAST)
        asyncio.run(embedded.start())
        try:
            yield Server(embedded)
        finally:
            asyncio.run(embedded.stop())


@pytest.fixture
async def empty_database(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database with nothing in it."""
    async with postgres.database() as dsn:
        yield dsn


@pytest.fixture
async def database(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database with Rowcast's own schema and ChatGenius in it."""
    template = await postgres.template("chatgenius", partial(migrate.apply, packs=("chatgenius",), report=ignore))
    async with postgres.database(template) as dsn:
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
