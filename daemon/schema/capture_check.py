"""Checks of the capture triggers of watched tables, and of the packs' schemas, in a live database."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import asyncpg

from daemon import files
from daemon.postgres.connect import Connection
from daemon.postgres.errors import DRIVER_ERRORS, explain
from daemon.schema import sql_files
from daemon.schema.queries import query

REAPPLY: Final = "run `daemon --apply-ddl`"
"""It watches every table again, which restores whatever rowcast.watch() has made."""

_TRIGGER: Final = "its capture trigger on {place} for {operations} "
_PROBLEMS: Final = {
    "gone": (
        "the table was dropped or renamed",
        "rename it back, or run `daemon unwatch` for it; for a table of a pack, call rowcast.unwatch_dropped()",
    ),
    "function_missing": ("its capture function {place} is missing", REAPPLY),
    "function_altered": ("its capture function {place} differs from what rowcast.watch() created", REAPPLY),
    "function_owner": ("its capture function {place} is not owned by rowcast_capture", REAPPLY),
    "snapshot_missing": ("the function that reads it for snapshots is missing", REAPPLY),
    "snapshot_altered": ("its snapshot function {place} differs from what rowcast.watch() created", REAPPLY),
    "right_missing": ("its function {place}, which says who may read its topics, is missing", REAPPLY),
    "right_altered": ("its function {place} differs from what rowcast.serve() created", REAPPLY),
    "missing": (_TRIGGER + "is missing", REAPPLY),
    "disabled": (_TRIGGER + "is disabled", REAPPLY),
    "replica": (_TRIGGER + "fires in replica mode only", REAPPLY),
    "not_always": (_TRIGGER + "is not ENABLE ALWAYS, as per_row requires", REAPPLY),
    "always": (_TRIGGER + "is ENABLE ALWAYS, so replication would fire it too", REAPPLY),
    "trigger_altered": (_TRIGGER + "differs from what rowcast.watch() created", REAPPLY),
    "open": ("{operations} may call its function {place}", "revoke all on function {place} from {operations}"),
    "stray": ("{place} is captured as this table", "attach or rename it back, or {operations}"),
    "detached": (
        "{place}, which was its partition, has its capture triggers still, and tells nothing",
        "attach it back, or {operations}",
    ),
    "replica_mode": ("its sessions fire no capture triggers, so what they write is not captured", "{operations}"),
    "replica_role": ("its sessions fire no capture triggers, so what they write is not captured", "{operations}"),
    "subscription": (
        "a subscription writes to {place}, but replication does not fire statement triggers",
        "call rowcast.watch() for it again with per_row => true",
    ),
    "column_gone": (
        "its captured column {place} was dropped or renamed",
        "rename it back or add it again, or call rowcast.watch() for it without that column",
    ),
    "key_null": ("its key column {place} may be null", "set it NOT NULL again"),
    "key_not_unique": ("its key ({place}) is not unique any more", "add a primary key or unique constraint on it"),
    "expression": (
        "its topic or its rights cannot be worked out ({place})",
        "put back what they read, or call rowcast.watch() for it with others",
    ),
    "child": (
        "what is written to its child {place} directly is not captured",
        "alter table {place} no inherit {name}, and call rowcast.watch() for it too",
    ),
    "parent": (
        "what is written to it through {place}, from which it inherits, is not captured",
        "alter table {name} no inherit {place}",
    ),
    "partition": (
        "it is a partition of {place}, and what is written to that is not captured",
        "alter table {place} detach partition {name}, or call rowcast.watch() for {place}",
    ),
    "column_changed": (
        "the type of its captured column {place} has changed: it may be told wrongly, or writes may fail",
        REAPPLY,
    ),
    "column_unreadable": (
        "rowcast_capture may not read its captured column {place}: snapshots fail, and so may writes, or the column "
        "is another one of that name",
        REAPPLY,
    ),
    "key_changed": (
        "a foreign key has changed, or its key ({place}) is deferrable: clients may end on an old version of a row",
        REAPPLY,
    ),
    "row_security": (
        "row security applies to rowcast_capture, which reads it: writes that need that fail",
        "alter role rowcast_capture bypassrls, or disable row security for it",
    ),
    "rows": (
        "each snapshot of a topic reads all of this large table",
        "call rowcast.watch() for it with `rows`, a condition on `r` and `topic` that an index can answer",
    ),
    "unlogged": (
        "it is unlogged: a crash of Postgres empties it, and clients hear nothing of that",
        "alter table {name} set logged",
    ),
}
_UNKNOWN: Final = (asyncpg.InsufficientPrivilegeError, asyncpg.LockNotAvailableError)
"""Why an expression cannot be judged: this role may not see what it reads, or somebody is changing that."""

_NOTES: Final = {"detached", "replica_role", "rows", "unlogged"}  # what may be so on purpose


@dataclass(frozen=True, slots=True)
class Problem:
    """One way in which a watched table, or another object of a pack's schema, differs from its definition."""

    table: str  # qualified, and quoted where SQL requires it; or the name of another object
    problem: str
    remedy: str
    is_note: bool = False  # whether it may be so on purpose, and is harmless for now

    def __str__(self) -> str:
        return f"{self.table}: {self.problem}: {self.remedy}"


async def check_captures(connection: Connection) -> list[Problem]:
    """Problems with the capture of watched tables, by table. Needs Rowcast's own schema. Raises a DatabaseFault."""
    try:
        triggers = await connection.fetch(query("capture_problems"))
        tables = await connection.fetch(query("watch_problems"))
        may_see_outdated = await connection.fetchval(query("may_see_outdated"))
        tables += await connection.fetch(query("outdated")) if may_see_outdated else []
        expressions = await _broken_expressions(connection)
        has_own = await connection.fetchval(query("has_own_tables"))
        rights = await connection.fetch(query("rights_of_own_tables")) if has_own else []
    except DRIVER_ERRORS as error:
        raise explain(error) from None
    problems = [_problem(row["name"], row["problem"], row["place"], row["operations"]) for row in triggers]
    problems += [_problem(row["name"], row["problem"], row["place"]) for row in tables]
    problems += [_problem(name, "expression", reason) for name, reason in expressions]
    problems += [_problem(row["name"], row["problem"], row["place"]) for row in rights if row["problem"]]
    own = {row["name"] for row in rights}
    problems = [
        replace(problem, remedy=_own_remedy(problem.remedy)) if problem.table in own else problem
        for problem in problems
    ]
    return sorted(problems, key=lambda problem: problem.table)


def _own_remedy(remedy: str) -> str:
    """The same for a table that is served without a pack: rowcast.watch() would end that."""
    return remedy.replace("call rowcast.watch()", "run `daemon watch`")


async def check_any_captured(connection: Connection, schemas: Iterable[str]) -> list[Problem]:
    """A problem for each of these schemas in which no table is captured. Raises DRIVER_ERRORS."""
    rows = await connection.fetch(query("uncaptured"), list(schemas))
    problem = "none of its tables is captured, as with ROWCAST_NOTIFICATIONS=false"
    return [Problem(f"schema {row['schema_name']}", problem, "run `daemon --apply-ddl`") for row in rows]


def _problem(name: str, kind: str, place: str, operations: str = "") -> Problem:
    problem, remedy = (text.format(name=name, place=place, operations=operations) for text in _PROBLEMS[kind])
    return Problem(name, problem, remedy, kind in _NOTES)


async def _broken_expressions(connection: Connection) -> list[tuple[str, str]]:
    """The tables with an expression that the server does not understand any more, and why. Nothing is executed."""
    expressions = {row["name"]: row["text"] for row in await connection.fetch(query("expressions"))}
    all_at_once = ", ".join(f"({text}) as e{number}" for number, text in enumerate(expressions.values()))
    if not expressions or await _parse(connection, f"select from {all_at_once}") is None:
        return []
    reasons = [(name, await _parse(connection, text)) for name, text in expressions.items()]
    return [(name, str(error.args[0])) for name, error in reasons if error and not isinstance(error, _UNKNOWN)]


async def _parse(connection: Connection, text: str) -> asyncpg.PostgresError | None:
    """Why the server does not understand a query; None if it does."""
    try:
        async with connection.transaction():
            await connection.execute(query("expression_session"))
            await connection.prepare(text)
    except (asyncpg.SyntaxOrAccessError, asyncpg.LockNotAvailableError) as error:
        return error
    return None


async def check_rules(
    connection: Connection, pack: str, schema: str, *, ddl_folder: Path | None = None
) -> list[Problem]:
    """The problems that ddl/<pack>/check.sql finds in the pack's schema; none if the pack has no such file.

    The file is one read-only query with the text columns `place`, `problem` and `remedy`. It runs with an empty
    search_path, so its names must be qualified. Raises BadSqlFile and a DatabaseFault.
    """
    path = (ddl_folder or files.folder("ddl")) / pack / "check.sql"
    if not path.is_file():
        return []
    file = sql_files.read(path, pack=pack, schema=schema)
    try:
        async with connection.transaction(readonly=True):
            await connection.execute("set local search_path = ''")
            rows = await connection.fetch(file.text)
    except asyncpg.ReadOnlySQLTransactionError:
        raise sql_files.BadSqlFile(file.name, 1, "it writes, but a check may only read") from None
    except DRIVER_ERRORS as error:
        raise explain(error, place=f" in {file.name}") from None
    return [Problem(row["place"], row["problem"], row["remedy"]) for row in rows]


async def count_watched(connection: Connection) -> int:
    """The number of watched tables. Raises a DatabaseFault."""
    try:
        return int(await connection.fetchval(query("count_watched")))
    except DRIVER_ERRORS as error:
        raise explain(error) from None
