from collections.abc import AsyncIterator

import pytest

from tests.support.issuer import RSA, KeyServer, key_server, key_set, page, public_jwk
from tests.support.postgres import Server


@pytest.fixture(scope="package")
async def dsn(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture
async def served() -> AsyncIterator[KeyServer]:
    """A key server with one RSA key, "first"."""
    async with key_server(page(key_set(public_jwk(RSA, kid="first")))) as served:
        yield served
