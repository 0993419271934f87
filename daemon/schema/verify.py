"""Verifies schemas after they were changed, before the change is committed.

A change is verified inside its own transaction, so whatever is found undoes all of it: the schemas are as the files
make them, no constraint waits for its validation, no row refers to one that does not exist. What was so before the
change is not the change's fault, and does not undo it.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Final

from daemon.core.errors import OperatorFault
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DRIVER_ERRORS, DatabaseFault, explain
from daemon.schema.capture_check import Problem, check_captures, check_rules
from daemon.schema.histories import ROWCAST
from daemon.schema.queries import query
from daemon.schema.revisions import RevisionHistory
from daemon.schema.schema_check import NOT_COMPARED, check_removed, check_revision, check_schemas
from daemon.schema.scratch import reset_of

_SHOWN: Final = 2  # problems in a message; all of them are reported before it


class VerificationFailed(OperatorFault):
    """The verification found {found}: {outcome}. Mend that, then try again."""

    exit_code: ClassVar[int] = 46

    def __init__(self, problems: Sequence[str], outcome: str = "nothing was changed") -> None:
        self.problems, self.outcome = tuple(problems), outcome
        more = len(problems) - _SHOWN
        self.found = "; ".join(problems[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")

    def __str__(self) -> str:
        return " ".join(super().__str__().split())


@dataclass(frozen=True, slots=True)
class Rows:
    """The number of rows of a table, and what the session's statistics say that it inserted and deleted."""

    count: int
    inserted: int
    deleted: int


@dataclass(frozen=True, slots=True)
class Verification:
    """What to verify: the schemas of these histories, with the files of these folders."""

    connection: Connection
    histories: Sequence[RevisionHistory]
    ddl_folder: Path | None = None
    triggers_folder: Path | None = None
    trigger_settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def schemas(self) -> dict[str, str]:
        """The schema of each pack."""
        return {history.pack: history.schema for history in self.histories if history.pack != ROWCAST}

    async def applied(self) -> list[str]:
        """What is wrong with schemas at their newest revisions: what `daemon check` finds, and broken references."""
        async with _undone(self.connection):
            captures = await self._captures()
            known = {problem.table for problem in captures}
            found = [problem for problem in captures if not problem.is_note]
            found += await check_schemas(
                self.connection,
                self.schemas,
                schemas=self.schemas,
                known=known,
                trigger_settings=self.trigger_settings,
                **self._folders(),
            )
            for pack, schema in self.schemas.items():
                found += await check_rules(self.connection, pack, schema, ddl_folder=self.ddl_folder)
            return [*map(str, found), *await self._unsound()]

    async def at(self, revisions: Mapping[str, str | None], *, everywhere: bool = False) -> list[str]:
        """What is wrong with schemas at these revisions and with their captures, apart from what triggers/ does.

        A schema at None should have nothing of its pack's files. With `everywhere`, references are also checked in
        tables that this transaction has not written to.
        """
        async with _undone(self.connection):
            prefixes = tuple(f"{schema}." for schema in revisions)
            found = [one for one in await self._captures() if one.table.startswith(prefixes) and not one.is_note]
            for history in (one for one in self.histories if one.schema in revisions):
                revision = revisions[history.schema]
                if revision is None:
                    found += await check_removed(self.connection, history, **self._folders())
                elif revision in history.revisions:
                    found += await check_revision(self.connection, history.until(revision), **self._folders())
            return [*map(str, found), *await self._unsound(everywhere=everywhere)]

    async def before(self, revisions: Mapping[str, str | None]) -> list[str]:
        """What may be wrong with schemas at these revisions before a change, and does not speak against it."""
        present = {schema: revision for schema, revision in revisions.items() if revision is not None}
        known = [str(NOT_COMPARED), *await self.at(present, everywhere=True)]
        async with _undone(self.connection):
            for pack, schema in self.schemas.items():
                with suppress(DatabaseFault):  # rules of the newest revision, which may read what is not there yet
                    found = await check_rules(self.connection, pack, schema, ddl_folder=self.ddl_folder)
                    known += map(str, found)
        return known

    async def rows(self, *, everywhere: bool = True) -> dict[str, Rows]:
        """The rows of the packs' tables; without `everywhere`, only of those that this transaction has written to."""
        only = None if everywhere else await self._written()
        tables = await self.connection.fetch(query("tables"), list(self.schemas.values()), only)
        return {
            row["name"]: Rows(await self.connection.fetchval(row["count_rows"]), row["inserted"], row["deleted"])
            for row in tables
        }

    async def _captures(self) -> list[Problem]:
        if await self.connection.fetchval("select pg_catalog.to_regclass('rowcast.watched') is null"):
            return []
        return await check_captures(self.connection)

    async def _unsound(self, *, everywhere: bool = False) -> list[str]:
        """Constraints that are not validated, and foreign keys with orphans."""
        schemas = [history.schema for history in self.histories]
        found = [
            f"{row['name']}: its constraint {row['constraint_name']} is not validated"
            for row in await self.connection.fetch(query("unvalidated"), schemas)
        ]
        only = None if everywhere else await self._written()
        return found + [
            f"{row['name']}: {orphans} rows refer to none, against {row['constraint_name']}"
            for row in await self.connection.fetch(query("references"), schemas, only)
            if (orphans := await self.connection.fetchval(row["count_orphans"]))
        ]

    async def _written(self) -> list[int]:
        return [row["oid"] for row in await self.connection.fetch(query("written"))]

    def _folders(self) -> dict[str, Path | None]:
        return {"ddl_folder": self.ddl_folder, "triggers_folder": self.triggers_folder}


def changed_rows(before: Mapping[str, Rows], after: Mapping[str, Rows]) -> list[str]:
    """A line for each table that is still there and has gained or lost rows in the transaction."""
    lines = []
    for name, now in after.items():
        then = before.get(name, Rows(0, 0, 0))
        inserted, deleted = now.inserted - then.inserted, now.deleted - then.deleted
        if inserted or deleted or (name in before and now.count != then.count):
            by_this = f"{inserted} inserted and {deleted} deleted by this change"
            lines.append(f"{name}: {then.count} rows before, {now.count} after ({by_this})")
    return lines


@asynccontextmanager
async def _undone(connection: Connection) -> AsyncIterator[None]:
    """A transaction, or a part of one, that is rolled back: settings and scratch schemas leave no trace.

    Raises the driver's errors as an OperatorFault.
    """
    transaction = connection.transaction()
    await transaction.start()
    try:
        await connection.execute(await reset_of(connection))
        yield
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    finally:
        if not connection.is_closed():
            await transaction.rollback()
