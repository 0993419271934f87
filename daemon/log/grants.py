"""Who may read what, according to the packs' `may_read` functions: the Grants port."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from typing import NamedTuple

import asyncpg

from daemon.core.change import Seq, Topic
from daemon.core.errors import GrantsUnavailable
from daemon.log.queries import query
from daemon.postgres.connect import Connection, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe
from daemon.postgres.queries import named

# The database's encoding has no such user or topic.
INEXPRESSIBLE = (asyncpg.UntranslatableCharacterError, asyncpg.CharacterNotInRepertoireError)

# Server errors that concern the connection, not the query.
UNANSWERED = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)

MAX_CONCURRENT_QUERIES = 4  # a crowd that reconnects leaves connections for reading the log
HELP_DELAY = 0.005  # seconds after which lookups that wait for a running statement get another one
MAX_KIND_QUERIES = 3  # of these, for topics of one kind: others are answered while a lock holds these up
MAX_OWN_QUERIES = 2  # of these, for tables that are served without a pack, each of which has one at most
MAX_QUERY_SIZE = 100  # rights looked up in one statement
PENDING_PAUSE = 0.01  # seconds between looks for an event's number: the leader takes about as long
ANSWER_TIMEOUT = 10.0  # seconds; the server ends the statements about tables without a pack after 4 of them


class _Kind(NamedTuple):
    """What is asked in one statement: about `own`, a table that is served without a pack, or one kind of topics."""

    schema: str
    own: str | None
    name: str


class _Lookup(NamedTuple):
    """May this user read this topic?"""

    kind: _Kind
    user: str
    topic: Topic
    answer: asyncio.Future[asyncpg.Record | Exception]
    begun: float  # by the clock of the event loop


class PgGrants:
    """Calls the SQL function `may_read` of the schema that serves a topic, which `schema_of` returns.

    Lookups are batched: while a statement runs, further lookups wait, and share the next one. So a crowd that
    reconnects costs few statements. Those that wait for longer get another statement beside it, up to
    MAX_CONCURRENT_QUERIES: the first may be one that takes long. Topics of one kind need the same tables, and so
    share statements; they never have all of them.

    `own_of` returns the table that serves a topic without a pack. Anybody may have written what is evaluated then: if
    it is slow, only lookups of the same table wait for it, and the server ends it.
    """

    def __init__(
        self,
        pool: Pool,
        schema_of: Callable[[Topic], str | None],
        own_of: Callable[[Topic], str | None] = lambda _: None,
        *,
        wait: float = 10.0,
    ) -> None:
        self._pool = pool
        self._schema_of = schema_of
        self._own_of = own_of
        self._wait = wait
        self._waiting: dict[_Kind, deque[_Lookup]] = {}  # the oldest first
        self._running: Counter[_Kind] = Counter()  # statements
        self._workers: set[asyncio.Task[None]] = set()
        self._helping: asyncio.TimerHandle | None = None  # set while lookups may wait for longer

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        """The position from which the user may read the topic; None if not at all. Raises GrantsUnavailable.

        0 if the right began before the log did. Waits up to `wait` seconds for the number of a right given just now.
        """
        schema = self._schema_of(topic)
        if schema is None:
            return None
        own = self._own_of(topic)
        kind = _Kind(schema, own, "" if own else topic.partition(":")[0])
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._wait
        while True:
            lookup = _Lookup(kind, user, topic, loop.create_future(), loop.time())
            self._waiting.setdefault(kind, deque()).append(lookup)
            if not self._workers:
                self._add_worker()
            elif self._helping is None:
                self._helping = loop.call_later(HELP_DELAY, self._help)
            answer = await lookup.answer
            if isinstance(answer, INEXPRESSIBLE):
                return None
            if isinstance(answer, DATABASE_ERRORS):
                asked = f"rights of {own or schema}: " if _concerns_query(answer) else ""
                raise GrantsUnavailable(asked + describe(answer)) from answer
            if isinstance(answer, Exception):
                raise answer
            if not answer["may_read"]:
                return None
            if not answer["pending"]:
                return Seq(answer["begun"])
            if loop.time() > limit:
                raise GrantsUnavailable("its beginning has no number yet")
            await asyncio.sleep(PENDING_PAUSE)

    def _help(self) -> None:
        """Start another statement if a lookup has waited for HELP_DELAY, and look again."""
        self._helping = None
        if self._waiting:
            loop = asyncio.get_running_loop()
            due = min(waiting[0].begun for waiting in self._waiting.values()) + HELP_DELAY
            if due <= loop.time():
                if len(self._workers) < MAX_CONCURRENT_QUERIES:
                    self._add_worker()
                due = loop.time() + HELP_DELAY
            self._helping = loop.call_at(due, self._help)

    def _add_worker(self) -> None:
        worker = asyncio.get_running_loop().create_task(self._work())
        self._workers.add(worker)
        worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        """Query until no lookup waits, but for those that another worker comes to."""
        while lookups := self._next_batch():
            self._running[lookups[0].kind] += 1
            try:
                await self._query(lookups)
            finally:
                self._running[lookups[0].kind] -= 1

    def _may_run(self, kind: _Kind) -> bool:
        """Whether there may be another statement of this kind."""
        if kind.own is None:
            return self._running[kind] < MAX_KIND_QUERIES
        own = sum(count for running, count in self._running.items() if running.own is not None)
        return not self._running[kind] and own < MAX_OWN_QUERIES

    def _next_batch(self) -> list[_Lookup]:
        """The oldest lookups of one kind, without those that were cancelled."""
        for kind, waiting in list(self._waiting.items()):
            if not self._may_run(kind):
                continue
            lookups: list[_Lookup] = []
            while waiting and len(lookups) < MAX_QUERY_SIZE:
                lookup = waiting.popleft()
                if not lookup.answer.done():
                    lookups.append(lookup)
            del self._waiting[kind]
            if waiting:
                self._waiting[kind] = waiting  # behind those of others
            if lookups:
                return lookups
        return []

    async def _query(self, lookups: Sequence[_Lookup]) -> None:
        """Answer each lookup with its row, or with the error."""
        schema, own, _ = lookups[0].kind
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
                is_limited = own is not None
                async with _limited(connection) if is_limited else nullcontext():
                    answers = await connection.fetch(statement, schema, users, topics)
        except Exception as error:  # noqa: BLE001 - the caller decides what it means
            if len(lookups) > 1 and _concerns_query(error):
                for lookup in lookups:  # one of them may have failed the others
                    if not lookup.answer.done():
                        await self._query([lookup])
                return
            answers = [error] * len(lookups)
        for lookup, answer in zip(lookups, answers, strict=True):
            if not lookup.answer.done():
                lookup.answer.set_result(answer)


@asynccontextmanager
async def _limited(connection: Connection) -> AsyncIterator[None]:
    """Let the server end statements that take too long."""
    await connection.execute(query("begin_limited"))
    try:
        yield
    except asyncpg.PostgresError:
        await connection.execute("rollback")
        raise
    await connection.execute("commit")  # nothing after a CancelledError: acquired() cuts the connection then


def _concerns_query(error: Exception) -> bool:
    """Whether another statement might be answered."""
    return isinstance(error, asyncpg.QueryCanceledError) or (
        isinstance(error, asyncpg.PostgresError) and not isinstance(error, UNANSWERED)
    )
