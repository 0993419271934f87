"""Who may read what, as the packs' `may_read` functions say: the Grants port."""

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

# Of what the server says, that which has nothing to do with what was asked.
UNANSWERED = (asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError)

ASKERS = 4  # statements about rights at once: a crowd that comes back leaves connections to who reads the log
MAX_QUESTIONS = 100  # about rights in one statement
PENDING_PAUSE = 0.01  # seconds until we look again whether an event has its number: the leader takes about as long
ANSWER_TIMEOUT = 10.0  # seconds


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

    async def _ask_on(self) -> None:
        """Ask until nothing waits."""
        while questions := self._gather():
            await self._ask(questions)

    def _gather(self) -> list[_Question]:
        """The questions of one schema that have waited longest, without those that nobody waits for any more."""
        questions: list[_Question] = []
        while self._waiting and len(questions) < MAX_QUESTIONS:
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
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
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
