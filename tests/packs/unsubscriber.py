"""Databases with the unsubscriber in them, as its owner and as its application see them."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg

from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.packs.databases import session
from tests.support.postgres import Server

APP = "email_unsubscribe_app"
PASSWORD = "only for tests"


async def give_password(owner: Connection, role: str = APP) -> None:
    """Set the role's password, as an operator does; roles belong to the server, whose databases all tests share."""
    await owner.execute(f"alter role {role} password '{PASSWORD}'")


def as_app(dsn: str, role: str = APP) -> str:
    """The same database for the application's role."""
    return re.sub("//[^@]*@", f"//{role}:{PASSWORD.replace(' ', '%20')}@", dsn)


@asynccontextmanager
async def unsubscriber(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database of its own with the unsubscriber and ChatGenius, whose application has a password."""

    async def build(dsn: str) -> None:
        await migrate.apply(dsn, ["email_unsubscribe", "chatgenius"], report=lambda _: None)
        async with session(dsn) as owner:
            await give_password(owner)

    template = await postgres.template("unsubscriber", build)
    async with postgres.database(template) as dsn:
        yield dsn


async def until_waiting(owner: Connection, pid: int) -> None:
    """Wait until that session waits for a lock."""
    while not await owner.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid):
        pass


async def until_gone(owner: Connection, pid: int) -> None:
    """Wait until that session has ended."""
    while await owner.fetchval("select exists (select from pg_stat_activity where pid = $1)", pid):
        pass


async def sqlstate_of(connection: Connection, statement: str) -> str | None:
    """Why a statement is refused; None if it is not. What it did is undone."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(statement)
    except asyncpg.PostgresError as error:
        return error.sqlstate
    finally:
        await transaction.rollback()
    return None
