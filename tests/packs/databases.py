"""Databases with the packs, shared by many tests, each of which rolls its changes back."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg

from daemon.packs import Pack, bundled
from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.support.postgres import Server

ROOT = Path(__file__).parents[2]


@asynccontextmanager
async def session(dsn: str) -> AsyncIterator[Connection]:
    """A connection with an empty search_path, as when the files are applied."""
    connection = await asyncpg.connect(dsn, server_settings={"search_path": ""})
    try:
        yield connection
    finally:
        await connection.close()


@asynccontextmanager
async def undone(
    postgres: Server, name: str, fill: Callable[[Connection], Awaitable[object]]
) -> AsyncIterator[Connection]:
    """A session in a transaction that is rolled back, in a database with all packs and the rows that `fill` adds."""

    async def build(dsn: str) -> None:
        await migrate.apply(dsn, list(bundled()), report=lambda _: None)
        async with session(dsn) as connection:
            await fill(connection)

    async with postgres.undone(name, build) as connection:
        yield connection


async def load_demo(db: Connection, pack: Pack) -> None:
    """Insert the pack's sample data."""
    await db.execute((ROOT / "ddl" / pack.name / "demo.sql").read_text())


class Events:
    """The events captured since this object was created."""

    def __init__(self, db: Connection, after: int) -> None:
        self._db = db
        self._after = after

    @classmethod
    async def from_now(cls, db: Connection) -> "Events":
        return cls(db, await db.fetchval("select coalesce(max(id), 0) from rowcast.events"))

    async def seen(self) -> list[tuple[str, str, str]]:
        """(table, topic, kind), in the order of capture."""
        return [(row["table_name"], row["topic"], row["kind"]) for row in await self.rows()]

    async def seen_with_keys(self) -> list[tuple[str, str, str, Any]]:
        """(table, topic, kind, key), in the order of capture."""
        return [(row["table_name"], row["topic"], row["kind"], json.loads(row["key"])) for row in await self.rows()]

    async def rows(self) -> list[asyncpg.Record]:
        """Each event with the name of its table, and with all of it as text."""
        return list(
            await self._db.fetch(
                "select w.table_name, e.*, e::text as all from rowcast.events e"
                " join rowcast.watched w on w.id = e.watch where e.id > $1 order by e.id",
                self._after,
            )
        )
