"""Checks of rights: those of the roles of daemons, and those of the functions that read watched tables."""

from collections.abc import Iterable
from typing import Final

import asyncpg

from daemon.postgres.connect import Connection
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema.capture_check import Problem
from daemon.schema.queries import query

_READERS: Final = {
    "right": "the function that says who may read its topics fails, so nobody may",
    "snapshot": "the function that reads it for snapshots fails, and so may writes",
}
_APPLY: Final = "run `daemon --apply-ddl`"


async def check_rights(connection: Connection) -> list[Problem]:
    """Rights that somebody has taken away, or that a condition needs and nobody has granted. Raises a DatabaseFault.

    What this role may not see is left out: the roles of daemons are the owner's to look at.
    """
    try:
        daemons = await connection.fetch(query("daemons")) if await _may_see_daemons(connection) else []
        lacking = await connection.fetch(query("lacking_rights"), [row["role"] for row in daemons], [], [])
        found = [Problem(f"role {row['role']}", f"it lacks {row['lacks']}", _APPLY) for row in lacking]
        for row in await connection.fetch(query("readers")):
            if denied := await _denied(connection, row["statement"]):
                problem = f"{_READERS[row['kind']]} ({denied})"
                found.append(Problem(row["name"], problem, "grant that to rowcast_capture, or " + _APPLY))
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    return found


async def lacking_rights(connection: Connection, schemas: Iterable[str], functions: Iterable[str]) -> str:
    """What this role lacks to serve packs in these schemas, which have these functions; empty if nothing.

    A statement may go on working after a schema was closed to the role: until it is prepared again.
    Raises DRIVER_ERRORS.
    """
    try:
        lacking = await connection.fetchrow(query("lacking_rights"), None, list(schemas), list(functions))
    except asyncpg.InsufficientPrivilegeError as error:
        return str(error)
    return lacking["lacks"] if lacking else ""


async def _may_see_daemons(connection: Connection) -> bool:
    return bool(await connection.fetchval(query("may_see_daemons")))


async def _denied(connection: Connection, statement: str) -> str:
    """Which right a function lacks when it is called; nothing if it lacks none."""
    try:
        async with connection.transaction(readonly=True):
            await connection.execute("set local statement_timeout = '4s'")
            await connection.execute(statement)
    except asyncpg.InsufficientPrivilegeError as error:
        return str(error)
    except asyncpg.PostgresError:
        pass  # its other problems are found elsewhere, and a text that is nobody's may be refused
    return ""
