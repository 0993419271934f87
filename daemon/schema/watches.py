"""Watches tables that no pack has, stops that, and lists what is watched."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import asyncpg

from daemon.core.errors import OperatorFault
from daemon.packs import bundled
from daemon.postgres.connect import Connection
from daemon.postgres.errors import explain
from daemon.schema.queries import query

# Of a wrong expression, and of what rowcast.watch() and rowcast.serve() refuse.
_REFUSALS = (
    asyncpg.SyntaxOrAccessError,
    asyncpg.DataError,
    asyncpg.FeatureNotSupportedError,
    asyncpg.ObjectNotInPrerequisiteStateError,
)


class NoSuchTable(OperatorFault):
    """There is no table {table}: write SCHEMA.TABLE, in quotes as SQL needs them."""

    exit_code: ClassVar[int] = 64

    def __init__(self, table: str) -> None:
        self.table = ascii(table)


class NoSuchFunction(OperatorFault):
    """There is no function {function}(text, text): write SCHEMA.FUNCTION; it takes the user and the topic."""

    exit_code: ClassVar[int] = 64

    def __init__(self, function: str) -> None:
        self.function = ascii(function)


class WatchedByPack(OperatorFault):
    """{table} belongs to the pack {pack}, which says how it is watched: nothing was changed."""

    exit_code: ClassVar[int] = 64

    def __init__(self, table: str, pack: str) -> None:
        self.table, self.pack = table, pack


class NotWatched(OperatorFault):
    """{table} is not watched: run `daemon watches` to see which tables are."""

    exit_code: ClassVar[int] = 64

    def __init__(self, table: str) -> None:
        self.table = table


class CannotWatch(OperatorFault):
    """{table} cannot be watched like this: {reason}."""

    exit_code: ClassVar[int] = 48

    def __init__(self, table: str, reason: str) -> None:
        reason = reason.removeprefix("rowcast: ").rpartition(" cannot be watched: ")[2]
        self.table, self.reason = table, " ".join(reason.split()).rstrip(".")


@dataclass(frozen=True)
class Watch:
    """How a table is to be watched; the parameters of rowcast.serve()."""

    table: str
    topic: str
    readable: str
    columns: Sequence[str] | None = None
    key: Sequence[str] | None = None
    soft_delete: str | None = None
    revokes: str | None = None
    rows: str | None = None
    topics: Sequence[str] | None = None


class Watching(NamedTuple):
    """How a table is watched from now on.

    `left_out` are its other columns, `virtual` those of them that have no value that could be told. Without `rows`
    each snapshot reads the whole table; `unindexed` is the column that an index would be needed for.
    """

    table: str
    columns: list[str]
    left_out: list[str]
    virtual: list[str]
    key: list[str]
    topics: list[str]
    rows: str | None
    unindexed: str | None


async def can_serve(connection: Connection) -> bool:
    """Whether the functions that `watch` needs are installed. Raises one of DRIVER_ERRORS."""
    return bool(await connection.fetchval(query("can_serve")))


async def watch(connection: Connection, wanted: Watch) -> Watching:
    """Watch a table, or watch it otherwise, in one transaction. Raises an OperatorFault, or one of DRIVER_ERRORS."""
    table = await _find(connection, wanted.table, "find_table")
    try:
        text = await connection.fetchval(
            query("serve"),
            table.name,
            wanted.topic,
            wanted.readable,
            wanted.columns,
            wanted.key,
            wanted.soft_delete,
            wanted.revokes,
            wanted.rows,
            wanted.topics,
        )
    except _REFUSALS as error:
        if isinstance(error, asyncpg.InsufficientPrivilegeError) and not str(error.args[0]).startswith("rowcast: "):
            raise explain(error) from None
        raise CannotWatch(table.name, str(error.args[0])) from None
    return Watching(table=table.name, **json.loads(text))


async def unwatch(connection: Connection, name: str) -> str:
    """Stop watching a table, also one that is gone; returns its name. Raises an OperatorFault or DRIVER_ERRORS."""
    table = await _find(connection, name, "find_table", "find_gone")
    if table.pack is None:
        raise NotWatched(table.name)
    await connection.execute(query("unwatch"), table.name)
    return table.name


async def function_named(connection: Connection, name: str) -> str:
    """An expression that calls this function for a user and a topic. Raises NoSuchFunction."""
    try:
        found = await connection.fetchval(query("find_function"), name)
    except _REFUSALS:
        found = None
    if found is None or "." not in found:
        raise NoSuchFunction(name)
    return f"{found.removesuffix('(text,text)')}(user_id, topic)"


async def watches(connection: Connection) -> list[dict[str, Any]]:
    """The watched tables. Raises one of DRIVER_ERRORS."""
    return [dict(row) for row in await connection.fetch(query("watches"))]


class _Table(NamedTuple):
    name: str
    pack: str | None


async def _find(connection: Connection, name: str, *queries: str) -> _Table:
    """The table that a query finds, unless a pack watches it. Raises NoSuchTable or WatchedByPack."""
    for each in queries:
        try:
            row = await connection.fetchrow(query(each), name)
        except _REFUSALS:
            row = None
        if row is not None:
            break
    else:
        raise NoSuchTable(name)
    if not row["is_own"] and row["pack"] in bundled():
        raise WatchedByPack(row["name"], row["pack"])
    return _Table(row["name"], row["pack"])
