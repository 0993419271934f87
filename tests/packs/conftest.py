"""Fixtures for the tests of packs."""

from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection
from tests.packs.databases import undone
from tests.support.postgres import Server


async def nothing(_: Connection) -> None:
    """A database with the packs and no rows."""


@pytest.fixture
async def db(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with all packs and no rows, in a transaction that is rolled back."""
    async with undone(postgres, "packs", nothing) as connection:
        yield connection
