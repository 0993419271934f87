"""The log, as Postgres keeps it: the EventLog and Grants ports, and the dead letters."""

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import asyncpg

from daemon.core.change import Change, Kind, Position, Right, Seq, Topic
from daemon.core.errors import GrantsUnavailable, LogForgotten, LogUnavailable
from daemon.postgres.connect import DRIVER_ERRORS, DatabaseFault, Pool, lent
from daemon.postgres.queries import query

MOST_ENDS = 5000  # rights that end one by one in a transaction that is too large to be told

# What can happen to any statement when Postgres restarts, the link is cut, or an answer takes too long.
BROKEN = (*DRIVER_ERRORS, DatabaseFault)

# Of what the server says, that which has nothing to do with what was asked.
UNANSWERED = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)

ASKERS = 4  # statements about rights at once: a crowd that comes back leaves connections to who reads the log
MOST_QUESTIONS = 100  # about rights in one statement
PENDING_PAUSE = 0.01  # seconds until we look again whether an event has its number: the leader takes about as long
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

    def __init__(self, pool: Pool, transaction_changes: int = 100_000) -> None:
        """A transaction of more than `transaction_changes` is told as `limit`."""
        self._pool = pool
        self._largest = transaction_changes

    async def head(self) -> Position:
        """The newest position; ("", 0) before the first leader has begun. Raises LogUnavailable."""
        with _translated():
            async with lent(self._pool, ANSWER_WITHIN) as connection:
                row = await connection.fetchrow(query("head"))
        return Position(row["epoch"], Seq(row["seq"])) if row else Position("", Seq(0))

    async def read(self, after: Seq, most: int) -> Sequence[Change]:
        """Whole transactions past `after`, oldest first. Raises LogUnavailable."""
        with _translated():
            rows = await self._fetch(READ_WITHIN, "changes", after, most)
            return await self._whole(rows, most, None)

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, most: int) -> Sequence[Change]:
        """The same for some topics, up to `upto`. Raises LogUnavailable and LogForgotten."""
        wanted, found, place = list(topics), list[Change](), after
        with _translated():
            while True:
                asked = most - len(found)
                rows = await self._fetch(READ_WITHIN, "changes_of_topics", place, upto, wanted, asked, self._largest)
                found += await self._whole(rows, asked, wanted)
                if len(rows) < asked or len(found) >= most:
                    break
                place = rows[-1]["tx_end"]  # many rows of a large transaction have become few changes
            # Asked behind the reading: a part of it may have been dropped before.
            [[floor]] = await self._fetch(ANSWER_WITHIN, "log_floor")
        if floor > after:
            raise LogForgotten
        return found

    async def _fetch(self, within: float, name: str, *arguments: object) -> list[asyncpg.Record]:
        async with lent(self._pool, within) as connection:
            return await connection.fetch(query(name), *arguments)

    async def _whole(self, rows: list[asyncpg.Record], most: int, topics: list[Topic] | None) -> list[Change]:
        """The changes of whole transactions, of which these rows are the beginning."""
        changes: list[Change] = []
        for end, group in groupby(rows, key=itemgetter("tx_end")):
            transaction = list(group)
            first, last = transaction[0]["seq"], transaction[-1]["seq"]
            if topics is None and end - first >= self._largest:
                # All rows are here but those before `after`, and numbers are dense inside a transaction.
                transaction = await self._fetch(TRANSACTION_WITHIN, "limits", first, end, self._largest, MOST_ENDS)
            elif topics is not None and transaction[0]["large"]:
                transaction = await self._fetch(READ_WITHIN, "limits_of_topics", first, end, topics)
            elif len(rows) == most and end == rows[-1]["tx_end"] and last < end:
                transaction += await self._fetch(TRANSACTION_WITHIN, "rest_of_transaction", last, end, topics)
            changes += map(change_of, transaction)
        return changes

    async def continuity(self, since: Position) -> str | None:
        """Why a stream cannot go on from `since`; None if it can. Raises LogUnavailable."""
        with _translated():
            async with lent(self._pool, ANSWER_WITHIN) as connection:
                row = await connection.fetchrow(query("continuity"), since.seq)
        assert row is not None
        if row["epoch"] != since.epoch:
            return "epoch"
        if since.seq < row["floor"]:
            return "retention"
        if row["recorded_end"] is None or since.seq > row["recorded_end"]:
            return "crash"
        return None


_KINDS = {kind.value: kind for kind in Kind}
_COLUMNS = itemgetter(
    "seq", "tx", "at", "schema_name", "table_name", "topic", "kind", "key", "record", "changed", "actor", "model",
    "revokes",
)  # fmt: skip


def change_of(row: asyncpg.Record) -> Change:
    """A row of `rowcast.changes`."""
    seq, tx, at, schema, table, topic, kind, key, record, changed, actor, model, revokes = _COLUMNS(row)
    ends = Right(row["revokes_user"], row["revokes_topic"]) if revokes else None
    changed = tuple(changed) if changed else ()
    return Change(seq, tx, at, schema, table, topic, _KINDS[kind], key, record, changed, actor, ends, model)


class DeadLetters:
    """Where changes go that their model refused."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def bury(self, letters: Sequence[tuple[Change, str, str]]) -> None:
        """Keep each (change, pack, reason). Raises LogUnavailable."""
        with _translated():
            async with lent(self._pool, READ_WITHIN) as connection:
                await connection.executemany(query("bury"), [(c.seq, pack, why) for c, pack, why in letters])


class _Question(NamedTuple):
    """May this user read this topic?"""

    schema: str
    user: str
    topic: Topic
    answer: asyncio.Future[asyncpg.Record | Exception]


class PgGrants:
    """Asks the SQL function `may_read` of the schema that serves a topic; `schema_of` knows which that is.

    ASKERS statements at once ask what has gathered meanwhile: a crowd that comes back costs few of them.
    """

    def __init__(self, pool: Pool, schema_of: Callable[[Topic], str | None], *, wait: float = 10.0) -> None:
        self._pool = pool
        self._schema_of = schema_of
        self._wait = wait
        self._waiting: deque[_Question] = deque()
        self._askers: set[asyncio.Task[None]] = set()

    async def readable_from(self, user: str, topic: Topic) -> Seq | None:
        """From where in the log on the user may read the topic; None if not at all. Raises GrantsUnavailable.

        0 if the right began before the log did. Who was given the right a moment ago waits until the log says where.
        """
        schema = self._schema_of(topic)
        if schema is None:
            return None
        loop = asyncio.get_running_loop()
        limit = loop.time() + self._wait
        while True:
            question = _Question(schema, user, topic, loop.create_future())
            self._waiting.append(question)
            if len(self._askers) < ASKERS:
                asker = loop.create_task(self._ask_on())
                self._askers.add(asker)
                asker.add_done_callback(self._askers.discard)
            answer = await question.answer
            if isinstance(answer, BROKEN):
                raise GrantsUnavailable(reason(answer)) from answer
            if isinstance(answer, Exception):
                raise answer
            if not answer["may_read"]:
                return None
            if not answer["pending"]:
                return Seq(answer["begun"])
            if loop.time() > limit:
                raise GrantsUnavailable("its beginning has no number yet")
            await asyncio.sleep(PENDING_PAUSE)

    async def _ask_on(self) -> None:
        """Ask until nothing waits."""
        while questions := self._gather():
            await self._ask(questions)

    def _gather(self) -> list[_Question]:
        """The questions of one schema that have waited longest, without those that nobody waits for any more."""
        questions: list[_Question] = []
        while self._waiting and len(questions) < MOST_QUESTIONS:
            if questions and self._waiting[0].schema != questions[0].schema:
                break
            question = self._waiting.popleft()
            if not question.answer.done():
                questions.append(question)
        return questions

    async def _ask(self, questions: Sequence[_Question]) -> None:
        """Answer each with its row, or with what went wrong."""
        schema = questions[0].schema
        # A schema's name is a plain identifier: applying the DDL let the server confirm that it needs no quotes.
        begun = query("readable_from").rstrip(";")
        statement = (
            f"select {schema}.may_read(right_.user_id, right_.topic) as may_read, right_.begun, right_.pending "  # noqa: S608
            f"from ({begun}) as right_ order by right_.place"
        )
        users, topics = [question.user for question in questions], [question.topic for question in questions]
        answers: Sequence[asyncpg.Record | Exception]
        try:
            async with lent(self._pool, ANSWER_WITHIN) as connection:
                answers = await connection.fetch(statement, schema, users, topics)
        except Exception as error:  # noqa: BLE001 - whoever asked says what it means
            if len(questions) > 1 and isinstance(error, asyncpg.PostgresError) and not isinstance(error, UNANSWERED):
                for question in questions:  # one of them may have spoilt it for the others
                    await self._ask([question])
                return
            answers = [error] * len(questions)
        for question, answer in zip(questions, answers, strict=True):
            if not question.answer.done():
                question.answer.set_result(answer)
