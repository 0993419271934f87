"""Whether rowcast.watch() would capture each watched table today, and in the same way as it did.

It is tried on an empty copy of the table, with the functions of a scratch schema. So the check knows all that watch()
knows: that a published column is gone or has another type, that a key is not unique, that a topic reads something
that does not exist or that it may not read, and that a newer version of Rowcast captures differently.
"""

from collections.abc import Collection
from typing import Final

import asyncpg

from daemon.postgres.connect import Connection
from daemon.postgres.errors import DatabaseFault, explain
from daemon.schema.capture_check import REAPPLY, Problem
from daemon.schema.histories import ROWCAST
from daemon.schema.scratch import Scratch, catalog

_REFUSED: Final = "mend that, or call rowcast.watch() for it as it is now"


async def try_captures(scratch: Scratch, known: Collection[str]) -> list[Problem]:
    """The problems of all watched tables but those in `known`. Raises DRIVER_ERRORS."""
    problems: list[Problem] = []
    if await scratch.connection.fetchval(
        "select pg_catalog.to_regclass($1) is null", f"{scratch.names[ROWCAST]}.watched"
    ):
        return problems
    await _call(scratch.connection, scratch.names[ROWCAST], "forget_watched")
    for watched in await scratch.connection.fetch(catalog("captures")):
        if watched["name"] in known:
            continue
        try:
            body = await _capture(scratch, watched)
        except asyncpg.PostgresError as error:
            fault = explain(error)
            reason = fault.reason if isinstance(fault, DatabaseFault) else str(fault)
            reason = scratch.in_live_names(reason.replace(scratch.spare, watched["schema_name"]))
            problems.append(Problem(watched["name"], f"rowcast.watch() would refuse it ({reason})", _REFUSED))
            continue
        if body != watched["body"]:
            problems.append(Problem(watched["name"], "rowcast.watch() would capture it differently today", REAPPLY))
    return problems


async def _capture(scratch: Scratch, watched: asyncpg.Record) -> str:
    """The body of the function that captures a copy of the table, in the names of the live schemas."""
    connection, rowcast = scratch.connection, scratch.names[ROWCAST]
    transaction = connection.transaction()
    await transaction.start()
    try:
        copy = f"{scratch.spare}.{watched['table_name']}"
        for row in await connection.fetch(catalog("copy_table"), watched["name"], scratch.spare):
            await connection.execute(row["statement"])
        await _call(connection, rowcast, "next_watch", watched["id"])
        how = (watched[name] for name in ("topic", "columns", "key", "soft_delete", "revokes", "pack", "model"))
        await _call(
            connection, rowcast, "watch", copy, *how, watched["per_row"], watched["on_error"], watched["rows"]
        )
        body = await _call(connection, rowcast, "captured_body", watched["id"])
    finally:
        await transaction.rollback()
    return scratch.in_live_names(str(body).replace(scratch.spare, watched["schema_name"]))


async def _call(connection: Connection, rowcast: str, name: str, *arguments: object) -> object:
    return await connection.fetchval(catalog(name).replace("the_rowcast", rowcast), *arguments)
