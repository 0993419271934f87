"""Builds the schemas of the files beside the live ones, for a comparison.

The files are run in schemas of random names, in a transaction that is rolled back: nothing stays, no live object is
locked or changed, and no writer waits.
"""

import re
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import asyncpg

from daemon.postgres.connect import Connection
from daemon.postgres.errors import explain
from daemon.postgres.queries import Queries
from daemon.schema.histories import ROWCAST, SESSION, reset_session, triggers_of
from daemon.schema.queries import query, query_for
from daemon.schema.revisions import RevisionHistory
from daemon.schema.sql_files import SqlFile

# What the server says about schemas that nobody will see is for nobody.
_SESSION: Final = {**SESSION, "lock_timeout": "5s", "client_min_messages": "error"}

catalog: Final = Queries(Path(__file__).with_name("catalog.sql"))


async def reset_of(connection: Connection, settings: Mapping[str, str] = _SESSION) -> str:
    """What `reset_session` returns for this connection, which keeps the role that it has taken on."""
    role = await connection.fetchval("select pg_catalog.current_setting('role')")
    return reset_session(settings, None if role == "none" else role)


@dataclass(frozen=True, slots=True)
class Scratch:
    """The schemas that the files were run in: `names` has the scratch schema of each live one; `spare` is empty."""

    connection: Connection
    names: dict[str, str]
    spare: str

    def in_live_names(self, text: str) -> str:
        """A text of the server with the names of the live schemas. The scratch names occur nowhere else."""
        for live, scratch in self.names.items():
            text = text.replace(scratch, live)
        return text


@asynccontextmanager
async def built(
    connection: Connection,
    histories: Sequence[RevisionHistory],
    triggers_folder: Path | None = None,
    trigger_settings: Mapping[str, str] = MappingProxyType({}),
    *,
    without_triggers: str | None = None,
) -> AsyncIterator[Scratch]:
    """Run the files in schemas of random names, which are gone at the end.

    The file in triggers/ of the pack in the schema `without_triggers` is left out: it fits the newest revision only.
    `trigger_settings` are session settings that these files read.
    """
    token = secrets.token_hex(6)
    prefix = f"rowcast_check_{token}"
    names = {history.schema: f"{prefix}_{number:02}" for number, history in enumerate(histories)}
    transaction = connection.transaction()
    await transaction.start()
    read_by_files = {name.replace(ROWCAST, names[ROWCAST]): value for name, value in trigger_settings.items()}
    reset = await reset_of(connection, {**_SESSION, **read_by_files})
    try:
        for live in histories:
            history = replace(live, schema=names[live.schema])
            await connection.execute(query_for("make_schema", history.schema))
            await connection.execute(catalog("version_table").replace("the_schema", history.schema))
            files = [history.up_file(revision) for revision in history.revisions]
            triggers = triggers_of(history, triggers_folder) if live.schema != without_triggers else None
            for file in filter(None, [*files, triggers]):
                await connection.execute(reset)
                await _run(connection, file, rowcast=names[ROWCAST], instead_of=live.schema)
        await connection.execute(await reset_of(connection))
        await connection.execute(query_for("make_schema", f"{prefix}_spare"))
        yield Scratch(connection, names, f"{prefix}_spare")
    finally:
        if not connection.is_closed():
            await transaction.rollback()


async def _run(connection: Connection, file: SqlFile, *, rowcast: str, instead_of: str) -> None:
    """Run a file on the scratch schemas, with a setting that tells it which schema they stand for."""
    if not file.statements:
        return
    text = re.sub(rf"\b{ROWCAST}\b", rowcast, file.text)
    if not file.in_transaction:  # nobody uses these tables, and here is a transaction
        text = re.sub(r"\bconcurrently\b", "", text, flags=re.IGNORECASE)
    await connection.execute(catalog("instead_of").replace("the_rowcast", rowcast), instead_of)
    try:
        await connection.execute(text)
        await connection.execute(query("settle_constraints"))
    except asyncpg.PostgresError as error:
        raise explain(error, place=file.place(error)) from None
