"""A server that is shared by all scenarios that leave it running, and the table of results."""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.faults.harness import DURABLE
from tests.faults.results import Results
from tests.support.postgres import Server, running_server


@pytest.fixture(scope="session")
async def durable_postgres() -> AsyncIterator[Server]:
    """A server with fsync on."""
    async with running_server(DURABLE) as server:
        yield server


@pytest.fixture
async def durable(durable_postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database with Rowcast's own schema and ChatGenius in it, on a server with fsync on."""
    async with durable_postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="session")
def results() -> Iterator[Results]:
    """Collects the results; `make faults` writes them to the guide."""
    found = Results()
    yield found
    found.publish()
