"""Reads the rows of topics from the tables: the RowReader port."""

import asyncio
from collections.abc import Callable
from typing import Final

from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.core.errors import SnapshotTooLarge
from daemon.core.snapshot import Rows, Visible, Wanted
from daemon.log.queries import query
from daemon.log.reader import ANSWER_TIMEOUT, translated
from daemon.postgres.connect import Connection, Pool, acquired

READ_TIMEOUT: Final = 60.0  # seconds for all tables of a topic; the server ends each statement after half of that
ISOLATION: Final = "repeatable_read"  # all statements read in one snapshot
FETCH: Final = 100  # rows in one answer of the server
PENDING_PAUSE: Final = 0.01  # seconds between looks for the numbers of events: the leader takes about as long
NUMBER_TIMEOUT: Final = 10.0  # seconds for these numbers


class PgRowReader:
    """Calls the functions that `rowcast.watch()` made for the tables of the schema that serves a topic.

    All of them read in one transaction, hence in one snapshot. A topic with more than `max_rows` rows, or `max_bytes`
    of them, is refused.
    """

    def __init__(self, pool: Pool, schema_of: Callable[[Topic], str | None], max_rows: int, max_bytes: int) -> None:
        self._pool = pool
        self._schema_of = schema_of
        self._max_rows = max_rows
        self._max_bytes = max_bytes

    async def read(self, wanted: Wanted) -> Rows:
        """The rows, and where the log continues. Raises LogUnavailable and SnapshotTooLarge."""
        schema = self._schema_of(wanted.topic) or ""
        with translated():
            async with (
                acquired(self._pool, READ_TIMEOUT) as connection,
                connection.transaction(isolation=ISOLATION, readonly=True),
            ):
                # The first statement: its snapshot is that of the transaction.
                shown = await connection.fetchrow(query("snapshot_position"))
                assert shown is not None
                rows, omitted = await self._rows(connection, schema, wanted)
            upto = shown["seq"] if not shown["pending"] else await self._numbered_upto(shown["visible"])
        position = Position(shown["epoch"] or "", Seq(shown["seq"]))
        return Rows(position, Visible.parse(shown["visible"]), Seq(upto), rows, omitted)

    async def _rows(self, connection: Connection, schema: str, wanted: Wanted) -> tuple[list[Change], dict[str, int]]:
        """The rows, and how many of each table are too large to be told."""
        rows, omitted, size = list[Change](), dict[str, int](), 0
        conditions = wanted.view.condition if wanted.view is not None else "{}"
        functions = await connection.fetch(query("snapshot_functions"), schema, wanted.topic, conditions)
        for schema_name, table, model, statement in functions:
            most = min(
                wanted.limit or self._max_rows + 1, self._max_rows + 1
            )  # one too many shows that there are more
            omitted[table] = 0
            async for key, record in connection.cursor(statement, wanted.topic, most, prefetch=FETCH):
                if record is None:
                    omitted[table] += 1
                    continue
                size += len(record)
                rows.append(
                    Change(Seq(0), "", "", schema_name, table, wanted.topic, Kind.INSERT, key, record, model=model)
                )
                if len(rows) > self._max_rows or size > self._max_bytes:
                    raise SnapshotTooLarge(self._max_rows, self._max_bytes)
        return rows, omitted

    async def _numbered_upto(self, visible: str) -> Seq:
        """The last number that a change in this snapshot can have. Waits until each of them has one."""
        async with asyncio.timeout(NUMBER_TIMEOUT):
            while True:
                async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                    upto = await connection.fetchval(query("numbered_upto"), visible)
                if upto is not None:
                    return Seq(upto)
                await asyncio.sleep(PENDING_PAUSE)
