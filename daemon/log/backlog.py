"""How long events have been waiting for their numbers, whoever leads: what readiness and `stale` follow."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

from daemon.core.change import Seq
from daemon.log.queries import query
from daemon.log.sequencer import Sequencer
from daemon.logs import get_logger
from daemon.postgres.connect import Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe

log = get_logger()

CHECK_DELAY: Final = 1.0  # seconds between two checks
MAX_AGE: Final = 9.0  # seconds without numbering after which a daemon is not ready
ANSWER_TIMEOUT: Final = 3.0  # seconds for one check
REPORT_DELAY: Final = 60.0  # seconds between two log lines about the same reason


class Backlog:
    """Watches whether numbering moves, on every daemon, leading or not.

    Numbering moves if this daemon has just numbered; if `position`, the newest number delivered here, grows; or if no
    event waits, or another one than before. Only the last needs a query, an index look-up. A long transaction has old
    events when it commits, so their own times say nothing.
    """

    def __init__(self, pool: Pool, sequencer: Sequencer, position: Callable[[], Seq]) -> None:
        self._pool = pool
        self._sequencer = sequencer
        self._position = position
        self._moved_at = time.monotonic()
        self._delivered = Seq(0)
        self._oldest: tuple[str, int] | None = None
        self._failure = ""  # why the last check failed

    @property
    def age(self) -> float:
        """Seconds for which numbering has stood still although events wait, or nobody knows; 0 if it moves."""
        age = time.monotonic() - self._moved_at
        return age if age > 2 * CHECK_DELAY else 0.0

    def reasons(self) -> list[str]:
        """Why this daemon is not ready, as far as numbering is concerned."""
        failure = self._sequencer.failure
        if self.age > MAX_AGE:
            return [f"events are not being numbered ({failure or self._failure or 'the leader does nothing'})"]
        if time.monotonic() - self._sequencer.leader_seen_at > MAX_AGE:
            return [f"no daemon can number events ({failure or 'no answer'})"]
        return []

    async def run(self) -> None:
        """Check until cancelled, and log when the reasons change."""
        reported, reported_at = list[str](), float("-inf")
        while True:
            began = time.monotonic()
            if await self._moves(began):
                self._moved_at = time.monotonic()
            reasons, now = self.reasons(), time.monotonic()
            if reasons and (reasons != reported or now - reported_at > REPORT_DELAY):
                log.warning("numbering_stalled", reason=reasons[0], age=round(self.age, 1))
                reported_at = now
            elif reported and not reasons:
                log.info("numbering_resumed")
            reported = reasons
            await asyncio.sleep(CHECK_DELAY)

    async def _moves(self, now: float) -> bool:
        position, self._delivered = self._delivered, self._position()
        if self._sequencer.numbered_at > now - 2 * CHECK_DELAY or position != self._delivered:
            self._oldest, self._failure = None, ""
            return True
        try:
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                oldest = await connection.fetchrow(query("oldest_unnumbered"))
        except DATABASE_ERRORS as error:
            self._failure = describe(error)
            return False
        before, self._oldest = self._oldest, (oldest["xid"], oldest["id"]) if oldest else None
        self._failure = ""
        return self._oldest is None or (before is not None and before != self._oldest)
