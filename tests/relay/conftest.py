from collections.abc import AsyncIterator
from itertools import count

import pytest

from tests.support.nats import NatsServer, running_nats

_NUMBERS = count(1)


@pytest.fixture(scope="session")
async def nats() -> AsyncIterator[NatsServer]:
    """A server that all tests of this process share. A test that stops it lets it go on."""
    async with running_nats() as server:
        yield server


@pytest.fixture
def prefix() -> str:
    """A prefix of subjects that no other test of this process uses."""
    return f"test{next(_NUMBERS)}"
