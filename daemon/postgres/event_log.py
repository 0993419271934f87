"""The log, as Postgres keeps it: the EventLog and Grants ports, and the dead letters."""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

import asyncpg

from daemon.core.change import Change, Kind, Position, Right, Seq, Topic
from daemon.core.errors import GrantsUnavailable, LogUnavailable
from daemon.postgres.connect import DRIVER_ERRORS, DatabaseFault, Pool, lent
from daemon.postgres.queries import query

# What can happen to any statement when Postgres restarts, the link is cut, or an answer takes too long.
BROKEN = (*DRIVER_ERRORS, DatabaseFault)

ANSWER_WITHIN = 10.0  # seconds for a small answer
READ_WITHIN = 30.0  # seconds for some changes
TRANSACTION_WITHIN = 900.0  # seconds for the rest of a transaction: it may hold millions of changes


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

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def head(self) -> Position:
        """The newest position; ("", 0) before the first leader has begun. Raises LogUnavailable."""
        with _translated():
            async with lent(self._pool, ANSWER_WITHIN) as connection:
                row = await connection.fetchrow(query("head"))
        return Position(row["epoch"], Seq(row["seq"])) if row else Position("", Seq(0))

    async def read(self, after: Seq, most: int) -> Sequence[Change]:
        """Whole transactions past `after`, oldest first. Raises LogUnavailable."""
        return await self._read(None, most, query("changes"), after, most)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, most: int) -> Sequence[Change]:
        """The same for some topics, up to `upto`. Raises LogUnavailable."""
        wanted = list(topics)
        return await self._read(wanted, most, query("changes_of_topics"), after, upto, wanted, most)

    async def _read(
        self, topics: list[Topic] | None, most: int, statement: str, *arguments: object
    ) -> Sequence[Change]:
        with _translated():
            async with lent(self._pool, READ_WITHIN) as connection:
                rows = await connection.fetch(statement, *arguments)
            if len(rows) == most and rows[-1]["tx_end"] > rows[-1]["seq"]:
                end = rows[-1]
                async with lent(self._pool, TRANSACTION_WITHIN) as connection:
                    rows += await connection.fetch(query("rest_of_transaction"), end["seq"], end["tx_end"], topics)
        return [_change(row) for row in rows]

    async def continuity(self, since: Position) -> str | None:
        """Why a stream cannot go on from `since`; None if it can. Raises LogUnavailable."""
        with _translated():
            async with lent(self._pool, ANSWER_WITHIN) as connection:
                row = await connection.fetchrow(query("continuity"), since.seq)
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
            async with lent(self._pool, READ_WITHIN) as connection:
                await connection.executemany(query("bury"), [(c.seq, pack, why) for c, pack, why in letters])


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
            async with lent(self._pool, ANSWER_WITHIN) as connection:
                return bool(await connection.fetchval(statement, user, topic))
        except BROKEN as error:
            raise GrantsUnavailable(reason(error)) from error
