"""Databases with the pack email_unsubscribe, for its owner and for its application."""

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
    """Let the role log in with a password, as an operator does. Roles belong to the server, which all tests share.

    In PostgreSQL 14, where PUBLIC may create objects in `public`, the operator has to revoke that, too.
    """
    await owner.execute(f"alter role {role} login password '{PASSWORD}'; revoke create on schema public from public")


def as_app(dsn: str, role: str = APP) -> str:
    """The DSN of the same database for the application's role."""
    return re.sub("//[^@]*@", f"//{role}:{PASSWORD.replace(' ', '%20')}@", dsn)


@asynccontextmanager
async def unsubscriber(postgres: Server) -> AsyncIterator[str]:
    """The DSN of a database of its own with the unsubscriber, whose role has a password, and ChatGenius."""

    async def build(dsn: str) -> None:
        await migrate.apply(dsn, ["email_unsubscribe", "chatgenius"], report=lambda _: None)
        async with session(dsn) as owner:
            await give_password(owner)

    template = await postgres.template("unsubscriber", build)
    async with postgres.database(template) as dsn:
        yield dsn


async def until_waiting(owner: Connection, pid: int) -> None:
    """Wait until the session `pid` waits for a lock."""
    while not await owner.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid):
        pass


async def until_gone(owner: Connection, pid: int) -> None:
    """Wait until the session `pid` has ended."""
    while await owner.fetchval("select exists (select from pg_stat_activity where pid = $1)", pid):
        pass


async def sqlstate_of(connection: Connection, statement: str) -> str | None:
    """The SQLSTATE with which a statement fails, or None. Its effects are rolled back."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(statement)
    except asyncpg.PostgresError as error:
        return error.sqlstate
    finally:
        await transaction.rollback()
    return None
