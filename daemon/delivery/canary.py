"""The canary: a row of Rowcast's own that goes the whole way, from a write in Postgres to a frame in this process."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Final

from daemon import metrics
from daemon.core.change import Numbers, Topic
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Hub
from daemon.health import Progress
from daemon.logs import get_logger
from daemon.packs import Pack, Row

log = get_logger()

TOPIC: Final = Topic("rowcast:canary")
SCHEMA: Final = "rowcast"
MAX_AGE: Final = 9.0  # seconds until the row must have arrived
MAX_WAITING: Final = 16  # rows; with more of them under way, no further one is written


class CanaryRow(Row):
    """The row that is written again and again."""

    id: int
    mark: str


CANARY: Final = Pack(name=SCHEMA, tables={"canary": CanaryRow}, topics=(TOPIC,), is_internal=True)
"""Lets the canary pass the router like the row of any other pack; clients cannot follow its topic."""


class Canary:
    """Writes the row every `every` seconds, and follows its topic in the hub as a client would.

    The time from just before a write to its frame is a metric. It contains the write and its commit, the wakeup, the
    numbering, reading, validating and building the frame, but no socket. `write` raises LogUnavailable.
    """

    user = ""  # no user's rights concern it
    numbers = Numbers.JSON

    def __init__(
        self,
        hub: Hub,
        write: Callable[[str], Awaitable[None]],
        every: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._write = write
        self._every = every
        self._clock = clock
        self._name = secrets.token_hex(8)
        self._written = 0
        self._waiting: dict[bytes, float] = {}  # when each row was written that has not arrived
        self._writing = Progress(clock)
        self.outlet = None

    def problems(self) -> list[str]:
        """Why this daemon is not ready, as far as the canary knows."""
        if self._writing.age > MAX_AGE:
            return [f"the canary row cannot be written ({self._writing.failure or 'no answer'})"]
        age = self._clock() - next(iter(self._waiting.values()), self._clock())
        return [f"a row takes more than {MAX_AGE:g} s from its write to its frame"] if age > MAX_AGE else []

    async def run(self) -> None:
        """Write until cancelled."""
        self._hub.follow(TOPIC, self)
        while True:
            if len(self._waiting) < MAX_WAITING:
                await self._send()
            await asyncio.sleep(self._every)

    async def _send(self) -> None:
        self._written += 1
        mark = f"{self._name}.{self._written}"
        self._writing.begin()
        self._waiting[mark.encode()] = self._clock()
        try:
            await self._write(mark)
        except LogUnavailable as error:
            self._waiting.pop(mark.encode(), None)  # whether it was committed is not known
            if self._writing.fail(error.reason):
                log.warning("log_unavailable", reason=error.reason)
        else:
            self._writing.end()

    def deliver(self, frames: bytes) -> None:
        """Observe the time of each row of this process in these frames. After a reset none of them is to come."""
        now = self._clock()
        for mark in [mark for mark in self._waiting if b'"' + mark + b'"' in frames]:
            metrics.CANARY_SECONDS.observe(now - self._waiting.pop(mark))
        if b'"op":"reset"' in frames:
            self._waiting.clear()

    def signal(self, frame: bytes) -> None:
        """Nobody may send a signal to its topic."""

    def revoked(self, topic: Topic) -> None:
        """Follow it again: nobody's right counts here."""
        self._hub.follow(topic, self)

    def discontinued(self) -> None:
        """What lies before the discontinuity does not arrive any more."""
        self._waiting.clear()
