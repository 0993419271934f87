"""Finds the events of a batch that cannot be numbered, and sets them aside so that the others can."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID

import asyncpg

from daemon.log.queries import query
from daemon.postgres.connect import Connection
from daemon.postgres.errors import describe

MAX_ATTEMPTS: Final = 3  # see rowcast.set_aside
ANSWER_TIMEOUT: Final = 30.0  # seconds for one statement

_DATA_CLASSES: Final = {"0A", "22", "23", "42", "54", "P0", "XX"}

Attempt = Callable[[Sequence[int]], Awaitable[None]]
"""Numbers only the events with these ids, and undoes that. Raises a PostgresError if they cannot be numbered."""


def may_blame_an_event(error: asyncpg.PostgresError) -> bool:
    """Whether a row may be to blame, rather than the server, the connection, or other transactions."""
    state = error.sqlstate or ""
    return state[:2] in _DATA_CLASSES or state == "53200"  # out of memory: a single value can be too large


@asynccontextmanager
async def undone(connection: Connection) -> AsyncIterator[None]:
    """A transaction or savepoint that is rolled back at the end."""
    transaction = connection.transaction()
    await transaction.start()
    try:
        yield
    finally:
        if not connection.is_closed():
            await transaction.rollback()


async def set_aside_events(
    connection: Connection,
    events: Sequence[asyncpg.Record],
    attempt: Attempt,
    leader: UUID,
    last_seq: int,
    error: asyncpg.PostgresError,
) -> None:
    """Set aside each of `events` that cannot be numbered by itself.

    Raises `error` if none is to blame, and what numbering nothing raises if that fails, too.
    """
    found = [event async for event in _culprits(events, attempt)]
    if not found:
        raise error
    for event, reason in found:
        await _set_aside(connection, event, attempt, leader, last_seq, reason)


async def _culprits(
    events: Sequence[asyncpg.Record], attempt: Attempt
) -> AsyncIterator[tuple[asyncpg.Record, asyncpg.PostgresError]]:
    """The events that cannot be numbered alone, found by halving."""
    undecided = [events]
    while undecided:
        some = undecided.pop()
        try:
            await attempt([event["id"] for event in some])
        except asyncpg.PostgresError as error:
            if not may_blame_an_event(error):
                raise
            if len(some) == 1:
                if (again := await _fails_again(some[0], attempt)) is not None:
                    yield some[0], again
            else:
                middle = len(some) // 2
                undecided += [some[middle:], some[:middle]]


async def _fails_again(event: asyncpg.Record, attempt: Attempt) -> asyncpg.PostgresError | None:
    """How numbering it fails once numbering nothing works, so that a fault that has just ended is not blamed on it.

    Raises a PostgresError if numbering nothing does not work: a right is missing, or a table.
    """
    await attempt([])
    try:
        await attempt([event["id"]])
    except asyncpg.PostgresError as error:
        if not may_blame_an_event(error):
            raise
        return error
    return None


async def _set_aside(
    connection: Connection,
    event: asyncpg.Record,
    attempt: Attempt,
    leader: UUID,
    last_seq: int,
    error: asyncpg.PostgresError,
) -> None:
    """Replace an event by a `limit`. Raises `error` if that cannot be numbered either: then it was not to blame."""
    async with connection.transaction():
        for number in range(1, MAX_ATTEMPTS + 1):
            await connection.execute(
                query("set_aside"), leader, event["xid"], event["id"], last_seq, number,
                f"cannot be numbered: {describe(error)}", timeout=ANSWER_TIMEOUT,
            )  # fmt: skip
            try:
                await attempt([event["id"]])
            except asyncpg.PostgresError as failure:
                if not may_blame_an_event(failure):
                    raise
            else:
                return
        raise error
