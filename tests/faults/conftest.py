"""A server that is shared by all scenarios that leave it running, and the table of results."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from functools import partial

import pytest

from daemon.embedded.server import EmbeddedPostgres
from daemon.schema import migrate
from tests.conftest import ignore
from tests.faults.harness import DURABLE
from tests.faults.results import Results
from tests.support.postgres import Server, chosen_binaries, passable_directory


@pytest.fixture(scope="session")
def durable_postgres() -> Iterator[Server]:
    """A server with fsync on."""
    with passable_directory() as directory:
        embedded = EmbeddedPostgres(directory, binaries=chosen_binaries(), settings=DURABLE)
        asyncio.run(embedded.start())
        try:
            yield Server(embedded)
        finally:
            asyncio.run(embedded.stop())


@pytest.fixture
async def durable(durable_postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database with Rowcast's own schema and ChatGenius in it, on a server with fsync on."""
    template = await durable_postgres.template(
        "chatgenius", partial(migrate.apply, packs=("chatgenius",), report=ignore)
    )
    async with durable_postgres.database(template) as dsn:
        yield dsn


@pytest.fixture(scope="session")
def results() -> Iterator[Results]:
    """Collects the results; `make faults` writes them to the guide."""
    found = Results()
    yield found
    found.publish()
