"""Reads the log in Postgres: the LogReader port."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter

import asyncpg

from daemon.core.change import Change, Kind, Position, Right, Seq, Topic
from daemon.core.errors import LogTruncated, LogUnavailable
from daemon.core.ports import Batch
from daemon.log.queries import query
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe

MAX_ENDED_RIGHTS = 5000  # ended rights that are listed one by one for a transaction too large to deliver

ANSWER_TIMEOUT = 10.0  # seconds for a small result
READ_TIMEOUT = 30.0  # seconds for a chunk of changes
TRANSACTION_TIMEOUT = 900.0  # seconds for the rest of a transaction: it may hold millions of changes


@contextmanager
def translated() -> Iterator[None]:
    """Turn database errors raised inside the block into LogUnavailable."""
    try:
        yield
    except DATABASE_ERRORS as error:
        raise LogUnavailable(describe(error)) from error


class PgLogReader:
    """Reads `rowcast.log`. The LogReader port documents its methods."""

    def __init__(self, pool: Pool, transaction_changes: int = 100_000) -> None:
        """A transaction of more than `transaction_changes` changes is read as `limit`."""
        self._pool = pool
        self._max_transaction = transaction_changes

    async def head(self) -> Position:
        """The newest position; ("", 0) before the first term. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                row = await connection.fetchrow(query("head"))
        return Position(row["epoch"], Seq(row["seq"])) if row else Position("", Seq(0))

    async def read(self, after: Seq, limit: int) -> Sequence[Change]:
        """Whole transactions past `after`, oldest first. Raises LogUnavailable."""
        with translated():
            rows = await self._fetch(READ_TIMEOUT, "changes", after, limit)
            return await self._complete(rows, limit, None)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        """The same for some topics, up to `upto`. Raises LogUnavailable and LogTruncated."""
        wanted, found, position = list(topics), list[Change](), after
        with translated():
            while True:
                chunk = limit - len(found)
                rows = await self._fetch(
                    READ_TIMEOUT, "changes_of_topics", position, upto, wanted, chunk, self._max_transaction
                )
                found += await self._complete(rows, chunk, wanted)
                if len(rows) < chunk or len(found) >= limit:
                    break
                position = rows[-1]["tx_end"]  # the many rows of a large transaction became few changes
            # Checked after reading, because a part of what was read may have been dropped before.
            [[floor]] = await self._fetch(ANSWER_TIMEOUT, "log_floor")
        if floor > after:
            raise LogTruncated
        return Batch(found)

    async def _fetch(self, time_limit: float, name: str, *arguments: object) -> list[asyncpg.Record]:
        async with acquired(self._pool, time_limit) as connection:
            return await connection.fetch(query(name), *arguments)

    async def _complete(self, rows: list[asyncpg.Record], limit: int, topics: list[Topic] | None) -> list[Change]:
        """The changes of whole transactions, of which these rows are the beginning."""
        changes: list[Change] = []
        for end, group in groupby(rows, key=itemgetter("tx_end")):
            transaction = list(group)
            first, last = transaction[0]["seq"], transaction[-1]["seq"]
            if topics is None and end - first >= self._max_transaction:
                # Numbers are dense inside a transaction, so this is how many of its changes follow `after`.
                transaction = await self._fetch(
                    TRANSACTION_TIMEOUT, "limits", first, end, self._max_transaction, MAX_ENDED_RIGHTS
                )
            elif topics is not None and transaction[0]["large"]:
                transaction = await self._fetch(READ_TIMEOUT, "limits_of_topics", first, end, topics)
            elif len(rows) == limit and end == rows[-1]["tx_end"] and last < end:
                transaction += await self._fetch(TRANSACTION_TIMEOUT, "rest_of_transaction", last, end, topics)
            changes += map(change_of, transaction)
        return changes

    async def continuity(self, since: Position) -> str | None:
        """Why a stream cannot continue from `since`; None if it can. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                row = await connection.fetchrow(query("continuity"), since.seq)
        assert row is not None
        if row["epoch"] != since.epoch:
            return "epoch"
        if since.seq < row["floor"]:
            return "retention"
        if not row["on_record"]:
            if row["crashed"] is None and not row["led"]:
                raise LogUnavailable("no leader")
            return "crash" if row["crashed"] else "epoch"
        return None


_KINDS = {kind.value: kind for kind in Kind}
_COLUMNS = itemgetter(
    "seq", "tx", "at", "schema_name", "table_name", "topic", "kind", "key", "record", "changed", "actor", "model",
    "revokes",
)  # fmt: skip


def change_of(row: asyncpg.Record) -> Change:
    """Convert a row of `rowcast.changes`."""
    seq, tx, at, schema, table, topic, kind, key, record, changed, actor, model, revokes = _COLUMNS(row)
    ends = Right(row["revokes_user"], row["revokes_topic"]) if revokes else None
    changed = tuple(changed) if changed else ()
    return Change(seq, tx, at, schema, table, topic, _KINDS[kind], key, record, changed, actor, ends, model)
