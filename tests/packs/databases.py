"""Databases that hold the packs, shared by many tests, each of which undoes what it did."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import asyncpg

from daemon.packs import bundled
from daemon.postgres import ddl
from daemon.postgres.connect import Connection
from tests.support.postgres import Server


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[Connection]:
    """A connection that finds nothing unqualified, as the files have it when they are applied."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": ""})
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def undone(
    postgres: Server, name: str, fill: Callable[[Connection], Awaitable[object]]
) -> AsyncIterator[Connection]:
    """A session in a transaction that is rolled back, in the database `name`: every pack, and what `fill` adds."""

    async def build(dsn: str) -> None:
        await ddl.apply(dsn, list(bundled()), report=lambda _: None)
        async with session(dsn) as connection:
            await fill(connection)

    template = await postgres.template(name, build)
    async with session(postgres.embedded.dsn_for(template)) as connection:
        transaction = connection.transaction()
        await transaction.start()
        yield connection
        await transaction.rollback()
