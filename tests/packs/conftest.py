"""Fixtures for the tests of packs."""

from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection
from tests.packs.databases import undone
from tests.support.postgres import Server


async def nothing(_: Connection) -> None:
    """For a database that holds the packs alone."""


@pytest.fixture
async def db(postgres: Server) -> AsyncIterator[Connection]:
    """A session in which every pack stands, without a row; what is done in it is undone."""
    async with undone(postgres, "packs", nothing) as connection:
        yield connection
