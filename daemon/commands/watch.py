"""`daemon watch`, `daemon unwatch` and `daemon watches`: tables that are served without a pack."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from daemon.core.errors import LogUnavailable, LogUnreadable
from daemon.delivery.own_tables import overlapping, pack_of
from daemon.log.own_tables import PgOwnTableReader
from daemon.packs import Pack, bundled
from daemon.postgres.connect import SESSION, Connection, connect, open_pool
from daemon.postgres.errors import DRIVER_ERRORS, address_of, explain
from daemon.schema import migrate, watches
from daemon.schema.capture_check import check_captures
from daemon.schema.health import SchemaNotCurrent
from daemon.schema.watches import CannotWatch, Watch, Watching
from daemon.settings import Settings

Report = Callable[[str], None]


async def watch(settings: Settings, wanted: Watch, report: Report, *, function: str | None = None) -> None:
    """Watch a table; `function` decides who may read its topics, unless it is None. Raises an OperatorFault."""
    async with _session(settings, report) as connection:
        if function is not None:
            wanted = replace(wanted, readable=await watches.function_named(connection, function))
        async with connection.transaction():
            done = await watches.watch(connection, wanted)
            applied = {row["pack"] for row in await watches.watches(connection)} & bundled().keys()
            for pack in map(bundled().__getitem__, sorted(applied)):
                if topic := overlapping(pack, done.topics):
                    raise CannotWatch(
                        done.table, f"the pack {pack.name} has topics like {topic}: begin with another text"
                    )
    for line in _described(done, wanted):
        report(line)


async def unwatch(settings: Settings, table: str, report: Report) -> None:
    """Stop watching a table. Raises an OperatorFault."""
    async with _session(settings, report) as connection:
        name = await watches.unwatch(connection, table)
    report(f"{name} is no longer watched")


async def show_watches(settings: Settings, report: Report, *, as_json: bool) -> None:
    """Print what is watched. Raises an OperatorFault."""
    async with _session(settings) as connection:
        found = await watches.watches(connection)
        problems = await check_captures(connection)
    for one in found:
        one["problems"] = [problem.problem for problem in problems if problem.table == one["name"]]
        report(json.dumps(one) if as_json else "\n".join(_lines(one["name"], _facts(one))))
    if not found and not as_json:
        report("no table is watched")


async def own_packs(settings: Settings) -> list[Pack]:
    """The tables that are served without a pack, each as a pack. Raises an OperatorFault."""
    pool = await open_pool(
        settings.require_dsn(), application_name="rowcast types", server_settings=SESSION, max_size=1
    )
    try:
        return [pack_of(table) for table in await PgOwnTableReader(pool).read()]
    except LogUnavailable as error:
        raise LogUnreadable(error.reason) from None
    finally:
        pool.terminate()


def _described(done: Watching, wanted: Watch) -> list[str]:
    facts = {
        "topics": ", ".join(done.topics),
        "readers": _readers(wanted.readable),
        "columns": ", ".join(done.columns),
        "left out": ", ".join(name if name not in done.virtual else f"{name} (virtual)" for name in done.left_out),
        "key": ", ".join(done.key),
        "snapshots": _about_snapshots(done, given=wanted.rows is not None),
    }
    return _lines(f"{done.table} is watched", facts)


def _readers(readable: str) -> str:
    if readable == "true":
        return "everybody with a token"
    return readable if "user_id" in readable else f"{readable} (the same for every user: it does not name user_id)"


def _about_snapshots(done: Watching, *, given: bool) -> str:
    if done.rows is None:
        return "each reads the whole table: give --rows, a condition that an index can answer"
    if done.unindexed is not None:
        return f"each reads the whole table: create index on {done.table} ({done.unindexed})"
    if given:
        return f"by {done.rows}"
    # What the server has read off the topic: one that all rows share, or a column and the rest of the topic.
    return (
        "of all rows" if done.rows.startswith("$1 = ") else f"by {done.rows.partition(' = ')[0]}, which has an index"
    )


def _facts(one: dict[str, Any]) -> dict[str, str]:
    if one["readable"] is not None:
        readers = _readers(one["readable"])
    elif one["pack"] in bundled():
        readers = f"as the pack {one['pack']} says"
    else:
        readers = "nobody: it was not watched with `daemon watch`"
    return {
        "topic": one["topic"],
        "topics": ", ".join(one["topics"] or ()),
        "readers": readers,
        "revokes": one["revokes"] or "",
        "columns": ", ".join(one["columns"]),
        "key": ", ".join(one["key"]),
        "soft delete": one["soft_delete"] or "",
        "since": one["since"] or "",
        "problems": "; ".join(one["problems"]),
    }


def _lines(title: str, facts: dict[str, str]) -> list[str]:
    return [title, *(f"  {name:11} {fact}" for name, fact in facts.items() if fact)]


@asynccontextmanager
async def _session(settings: Settings, report: Report | None = None) -> AsyncIterator[Connection]:
    """A session that looks at what is watched, or changes it: then with `report`. Raises an OperatorFault."""
    dsn = settings.require_dsn()
    connection = await connect(
        dsn,
        application_name="rowcast watch",
        server_settings={**migrate.SESSION, "lock_timeout": f"{settings.lock_timeout * 1000:.0f}"},
        attempts=settings.connect_attempts,
    )
    try:
        if stale := await migrate.stale(connection, ()):
            raise SchemaNotCurrent(stale)
        if not await watches.can_serve(connection):
            raise SchemaNotCurrent("its functions are missing")
        if report is not None:
            await migrate.wait_for_lock(connection, report, settings.lock_timeout)
        yield connection
    except DRIVER_ERRORS as error:
        raise explain(error, address=address_of(dsn)) from None
    finally:
        connection.terminate()
