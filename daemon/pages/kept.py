"""What the console shows of the database: the watches, and the dead letters, which it can replay."""

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from daemon.core.errors import OperatorFault, RowcastError
from daemon.gateway.http import Call, Page, json_page, text_page
from daemon.log import dead_letters
from daemon.log.dead_letters import Refusal, Selection
from daemon.log.queries import query
from daemon.pages.access import BAD_BODY, json_body
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe

WATCHES_FRESH: Final = 15.0  # seconds; watches change with a command
DATABASE_TIMEOUT: Final = 3.0  # seconds for the console's own statements
REPLAY_TIMEOUT: Final = 10.0  # seconds
MAX_DEAD_LETTERS: Final = 50


class KeptUnavailable(RowcastError):
    """What the database keeps cannot be read: {reason}."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Kept(NamedTuple):
    """The watches, and the newest dead letters, as the page takes them."""

    watches: list[dict[str, Any]]
    dead_letters: list[dict[str, Any]]
    more_dead_letters: bool


NOTHING: Final = Kept([], [], more_dead_letters=False)

ReadKept = Callable[[], Awaitable[Kept]]
"""Reads it. Raises KeptUnavailable."""


class PgKept:
    """Reads it from the database, and replays dead letters."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._watches: list[dict[str, Any]] = []
        self._watches_read_at = float("-inf")

    async def read(self) -> Kept:
        """See ReadKept."""
        try:
            async with acquired(self._pool, DATABASE_TIMEOUT) as connection:
                found = await dead_letters.find(connection, Selection(limit=MAX_DEAD_LETTERS + 1))
                if time.monotonic() - self._watches_read_at > WATCHES_FRESH:
                    self._watches = [dict(watch) for watch in await connection.fetch(query("watches"))]
                    self._watches_read_at = time.monotonic()
        except (*DATABASE_ERRORS, OperatorFault) as error:
            raise KeptUnavailable(describe(error)) from None
        newest = [_dead_letter(record) for record in found[-MAX_DEAD_LETTERS:]][::-1]
        return Kept(self._watches, newest, len(found) > MAX_DEAD_LETTERS)

    async def page(self, _: Call) -> Page:
        """The same for a gateway, which asks for its own console."""
        try:
            return json_page(await self.read())
        except KeptUnavailable as error:
            return text_page(error.reason, 503)

    async def replay(self, call: Call) -> Page:
        """Replay one dead letter, {"seq": N}, as a new change."""
        seq = (json_body(call) or {}).get("seq")
        if type(seq) is not int or not 0 <= seq < 2**63:
            return BAD_BODY
        refusals: list[Refusal] = []
        try:
            async with acquired(self._pool, REPLAY_TIMEOUT) as connection:
                await dead_letters.replay(connection, Selection([seq]), refusals.append)
        except dead_letters.UnknownDeadLetter:
            return text_page(f"There is no dead letter {seq} any more.", 404)
        except dead_letters.ReplayNotAllowed as fault:
            return text_page(f"{fault} `daemon dead-letters replay` as the owner does it.", 403)
        except DATABASE_ERRORS as error:
            return text_page(f"The database does not answer: {describe(error)}", 503)
        if refusals:
            return text_page(f"Not replayed: {dead_letters.REFUSALS[refusals[0].reason]}.", 409)
        return json_page({"replayed": seq})


def _dead_letter(record: Any) -> dict[str, Any]:  # noqa: ANN401 - a record of the driver
    names = ("seq", "at", "pack", "table_name", "topic", "kind", "key", "reason")
    return {name: record[name] for name in names}
