"""Who may read what, according to the packs' `may_read` functions: the Grants port."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import asyncpg

from daemon.core.change import Seq, Topic
from daemon.core.errors import GrantsUnavailable
from daemon.log.queries import query
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe
from daemon.postgres.queries import named

# The database's encoding has no such user or topic.
INEXPRESSIBLE = (asyncpg.UntranslatableCharacterError, asyncpg.CharacterNotInRepertoireError)

# Server errors that concern the connection, not the query.
UNANSWERED = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)

MAX_CONCURRENT_QUERIES = 4  # a crowd that reconnects leaves connections for reading the log
MAX_QUERY_SIZE = 100  # rights looked up in one statement
PENDING_PAUSE = 0.01  # seconds between looks for an event's number: the leader takes about as long
ANSWER_TIMEOUT = 10.0  # seconds


class _Lookup(NamedTuple):
    """May this user read this topic?"""

    schema: str
    user: str
    topic: Topic
    answer: asyncio.Future[asyncpg.Record | Exception]


class PgGrants:
    """Calls the SQL function `may_read` of the schema that serves a topic, which `schema_of` returns.

    Lookups are batched: while MAX_CONCURRENT_QUERIES statements run, further lookups wait, and share the next one. So
    a crowd that reconnects costs few statements.
    """

    def __init__(self, pool: Pool, schema_of: Callable[[Topic], str | None], *, wait: float = 10.0) -> None:
        self._pool = pool
        self._schema_of = schema_of
        self._wait = wait
        self._waiting: deque[_Lookup] = deque()
        self._workers: set[asyncio.Task[None]] = set()

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        """The position from which the user may read the topic; None if not at all. Raises GrantsUnavailable.

        0 if the right began before the log did. Waits up to `wait` seconds for the number of a right given just now.
        """
        schema = self._schema_of(topic)
        if schema is None:
            return None
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._wait
        while True:
            lookup = _Lookup(schema, user, topic, loop.create_future())
            self._waiting.append(lookup)
            if len(self._workers) < MAX_CONCURRENT_QUERIES:
                worker = loop.create_task(self._work())
                self._workers.add(worker)
                worker.add_done_callback(self._workers.discard)
            answer = await lookup.answer
            if isinstance(answer, INEXPRESSIBLE):
                return None
            if isinstance(answer, DATABASE_ERRORS):
                raise GrantsUnavailable(describe(answer)) from answer
            if isinstance(answer, Exception):
                raise answer
            if not answer["may_read"]:
                return None
            if not answer["pending"]:
                return Seq(answer["begun"])
            if loop.time() > limit:
                raise GrantsUnavailable("its beginning has no number yet")
            await asyncio.sleep(PENDING_PAUSE)

    async def _work(self) -> None:
        """Query until no lookup waits."""
        while lookups := self._next_batch():
            await self._query(lookups)

    def _next_batch(self) -> list[_Lookup]:
        """The oldest lookups of one schema, without those that were cancelled."""
        lookups: list[_Lookup] = []
        while self._waiting and len(lookups) < MAX_QUERY_SIZE:
            if lookups and self._waiting[0].schema != lookups[0].schema:
                break
            lookup = self._waiting.popleft()
            if not lookup.answer.done():
                lookups.append(lookup)
        return lookups

    async def _query(self, lookups: Sequence[_Lookup]) -> None:
        """Answer each lookup with its row, or with the error."""
        schema = lookups[0].schema
        # The server confirmed that a schema's name needs no quotes when the DDL was applied.
        begun = query("readable_from").rstrip(";")
        statement = named(
            f"select {schema}.may_read(right_.user_id, right_.topic) as may_read, right_.begun, right_.pending "  # noqa: S608
            f"from ({begun}) as right_ order by right_.place",
            "readable_from",
        )
        users, topics = [lookup.user for lookup in lookups], [lookup.topic for lookup in lookups]
        answers: Sequence[asyncpg.Record | Exception]
        try:
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                answers = await connection.fetch(statement, schema, users, topics)
        except Exception as error:  # noqa: BLE001 - the caller decides what it means
            if len(lookups) > 1 and isinstance(error, asyncpg.PostgresError) and not isinstance(error, UNANSWERED):
                for lookup in lookups:  # one of them may have failed the others
                    await self._query([lookup])
                return
            answers = [error] * len(lookups)
        for lookup, answer in zip(lookups, answers, strict=True):
            if not lookup.answer.done():
                lookup.answer.set_result(answer)
