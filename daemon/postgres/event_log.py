"""The log, as Postgres keeps it: the EventLog and Grants ports, and the dead letters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter

import asyncpg

from daemon.core.change import Change, Kind, Position, Right, Seq, Topic
from daemon.core.errors import GrantsUnavailable, LogUnavailable
from daemon.postgres.connect import DRIVER_ERRORS, DatabaseFault, Pool
from daemon.postgres.queries import query

MOST_ENDS = 5000  # rights that end one by one in a transaction that is too large to be told

# What can happen to any statement when Postgres restarts, the link is cut, or an answer takes too long.
BROKEN = (*DRIVER_ERRORS, DatabaseFault)


def reason(error: BaseException) -> str:
    """What to say of a driver's error: its kind and state, never its text, which may hold values of rows."""
    state = getattr(error, "sqlstate", None)
    return f"{type(error).__name__} {state}" if state else type(error).__name__


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        raise LogUnavailable(reason(error)) from error


class PgEventLog:
    """Reads `rowcast.log`. See the EventLog port for what its methods promise."""

    def __init__(self, pool: Pool, transaction_changes: int = 100_000) -> None:
        """A transaction of more than `transaction_changes` is told as `limit`."""
        self._pool = pool
        self._largest = transaction_changes

    async def head(self) -> Position:
        """The newest position; ("", 0) before the first leader has begun. Raises LogUnavailable."""
        with _translated():
            row = await self._pool.fetchrow(query("head"))
        return Position(row["epoch"], Seq(row["seq"])) if row else Position("", Seq(0))

    async def read(self, after: Seq, most: int) -> Sequence[Change]:
        """Whole transactions past `after`, oldest first. Raises LogUnavailable."""
        with _translated():
            rows = await self._pool.fetch(query("changes"), after, most)
            return await self._whole(rows, most, None)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, most: int) -> Sequence[Change]:
        """The same for some topics, up to `upto`. Raises LogUnavailable."""
        wanted, found = list(topics), list[Change]()
        with _translated():
            while True:
                asked = most - len(found)
                rows = await self._pool.fetch(query("changes_of_topics"), after, upto, wanted, asked, self._largest)
                found += await self._whole(rows, asked, wanted)
                if len(rows) < asked or len(found) >= most:
                    return found
                after = rows[-1]["tx_end"]  # many rows of a large transaction have become few changes

    async def _whole(self, rows: list[asyncpg.Record], most: int, topics: list[Topic] | None) -> list[Change]:
        """The changes of whole transactions, of which these rows are the beginning."""
        changes: list[Change] = []
        for end, group in groupby(rows, key=itemgetter("tx_end")):
            transaction = list(group)
            first, last = transaction[0]["seq"], transaction[-1]["seq"]
            # All rows are here but those before `after`, and numbers are dense inside a transaction.
            if end - first >= self._largest if topics is None else transaction[0]["large"]:
                transaction = await self._pool.fetch(
                    *(query("limits"), first, end, self._largest, MOST_ENDS)
                    if topics is None
                    else (query("limits_of_topics"), first, end, topics)
                )
            elif len(rows) == most and end == rows[-1]["tx_end"] and last < end:
                transaction += await self._pool.fetch(query("rest_of_transaction"), last, end, topics)
            changes += map(_change, transaction)
        return changes

    async def continuity(self, since: Position) -> str | None:
        """Why a stream cannot go on from `since`; None if it can. Raises LogUnavailable."""
        with _translated():
            row = await self._pool.fetchrow(query("continuity"), since.seq)
        assert row is not None
        if row["epoch"] != since.epoch:
            return "epoch"
        if row["recorded_end"] is None or since.seq > row["recorded_end"]:
            return "crash"
        return None


def _change(row: asyncpg.Record) -> Change:
    return Change(
        seq=row["seq"],
        tx=row["tx"],
        at=row["at"],
        schema=row["schema_name"],
        table=row["table_name"],
        model=row["model"],
        topic=row["topic"],
        kind=Kind(row["kind"]),
        key=row["key"],
        record=row["record"],
        changed=tuple(row["changed"] or ()),
        actor=row["actor"],
        ends=Right(row["revokes_user"], row["revokes_topic"]) if row["revokes"] else None,
    )


class DeadLetters:
    """Where changes go that their model refused."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def bury(self, letters: Sequence[tuple[Change, str, str]]) -> None:
        """Keep each (change, pack, reason). Raises LogUnavailable."""
        with _translated():
            await self._pool.executemany(query("bury"), [(c.seq, pack, why) for c, pack, why in letters])


class PgGrants:
    """Asks the SQL function `may_read` of the schema that serves a topic; `schema_of` knows which that is."""

    def __init__(self, pool: Pool, schema_of: Callable[[Topic], str | None]) -> None:
        self._pool = pool
        self._schema_of = schema_of

    async def may_read(self, user: str, topic: Topic) -> bool:
        """May this user follow this topic now? False if nobody serves it. Raises GrantsUnavailable."""
        schema = self._schema_of(topic)
        if schema is None:
            return False
        # A schema's name is a plain identifier: applying the DDL let the server confirm that it needs no quotes.
        statement = f"select {schema}.may_read($1, $2)"
        try:
            return bool(await self._pool.fetchval(statement, user, topic))
        except BROKEN as error:
            raise GrantsUnavailable(reason(error)) from error
