"""The users whom tokens of another issuer mean, according to a pack."""

import asyncio
from collections.abc import Sequence
from typing import Final, NamedTuple

from daemon.core.errors import GrantsUnavailable
from daemon.log.grants import INEXPRESSIBLE
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe
from daemon.postgres.queries import named

MAX_CONCURRENT_QUERIES: Final = 2
MAX_QUERY_SIZE: Final = 100  # subjects looked up in one statement
ANSWER_TIMEOUT: Final = 3.0  # seconds; less than a client waits for its welcome


class _Lookup(NamedTuple):
    """Whom does this subject mean?"""

    subject: str
    answer: asyncio.Future[str | Exception | None]


class PgUsers:
    """Looks up users with a statement that gets subjects and returns `subject` and `user_id` of those that it knows.

    While MAX_CONCURRENT_QUERIES statements run, further lookups wait and share the next one, so a crowd that
    reconnects costs few statements. Nothing is cached: once a user is deleted, its tokens mean nobody.
    """

    def __init__(self, pool: Pool, statement: str) -> None:
        self._pool = pool
        self._statement = named(statement, "users_of")
        self._waiting: list[_Lookup] = []
        self._workers: set[asyncio.Task[None]] = set()

    async def user_of(self, subject: str) -> str | None:
        """The user whom this subject means; None if there is none. Raises GrantsUnavailable."""
        loop = asyncio.get_running_loop()
        lookup = _Lookup(subject, loop.create_future())
        self._waiting.append(lookup)
        # One that is done may still be in the set, if its answer is what led to this call.
        if sum(not worker.done() for worker in self._workers) < MAX_CONCURRENT_QUERIES:
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
        return answer

    async def _work(self) -> None:
        """Query until no lookup waits."""
        while self._waiting:
            lookups = [lookup for lookup in self._waiting[:MAX_QUERY_SIZE] if not lookup.answer.done()]
            del self._waiting[:MAX_QUERY_SIZE]
            await self._query(lookups)

    async def _query(self, lookups: Sequence[_Lookup]) -> None:
        """Answer each lookup with its user, or with the error."""
        users: dict[str, str] = {}
        failure: Exception | None = None
        try:
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                rows = await connection.fetch(self._statement, [lookup.subject for lookup in lookups])
            users = {row["subject"]: row["user_id"] for row in rows}
        except Exception as error:  # noqa: BLE001 - the caller decides what it means
            if len(lookups) > 1 and isinstance(error, INEXPRESSIBLE):  # one of them fails the others
                for lookup in lookups:
                    await self._query([lookup])
                return
            failure = error
        for lookup in lookups:
            if not lookup.answer.done():
                lookup.answer.set_result(failure or users.get(lookup.subject))
