"""What the log forgets: earlier content of rows that were deleted, at once; and everything, once it is old enough."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

import asyncpg

from daemon import metrics
from daemon.core.change import Seq
from daemon.log.queries import query
from daemon.log.sequencer import Sequencer
from daemon.logs import get_logger
from daemon.postgres.connect import Connect, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, describe

log = get_logger()

SEGMENTS: Final = (
    4  # that one retention is cut into: with more of them less is kept for too long, but each read looks at all
)
ROWS: Final = 1000  # deleted rows whose content goes in one transaction
PAUSE: Final = 1.0  # seconds from a failure to the next attempt
CLEANUP_TIMEOUT: Final = 60.0  # seconds for one statement
DROP_TIMEOUT: Final = 900.0  # seconds for a table to be detached or dropped: it may have to wait for who reads

DROPPING: Final = {"lock_timeout": "60s"}
"""Detaching waits until nobody reads any more who began before; nobody waits behind it."""


class Retention:
    """Keeps house while `sequencer` leads, and says where the log begins.

    Rows that were deleted lose their earlier content when the leader says that there are any. Every `look_every`
    seconds the segments that were closed more than `keep` ago are dropped; there is always one made ahead, and it is
    opened in time. Whoever leads, `forgotten` is told up to where the log has been dropped. `connect` opens a
    connection with the settings DROPPING.
    """

    def __init__(
        self,
        pool: Pool,
        connect: Connect,
        sequencer: Sequencer,
        keep: timedelta,
        forgotten: Callable[[Seq], None] = lambda _: None,
        *,
        look_every: float | None = None,
    ) -> None:
        self._pool = pool
        self._connect = connect
        self._sequencer = sequencer
        self._keep = keep
        self._forgotten = forgotten
        self._look_every = look_every or min(60.0, keep.total_seconds() / SEGMENTS / 4)

    async def run(self) -> None:
        """Keep house until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._for_ever(self._sequencer.deletions, self.purge, 0))
            group.create_task(self._for_ever(self._sequencer.leading, self.sweep, self._look_every))
            group.create_task(self._for_ever(self._sequencer.settled, self.look, self._look_every))

    async def _for_ever(self, due: asyncio.Event, work: Callable[[], Awaitable[None]], pause: float) -> None:
        failing = False
        while True:
            await due.wait()
            try:
                await work()
            except DATABASE_ERRORS as error:
                if not failing:
                    log.warning("retention_failed", reason=describe(error))
                failing = True
            else:
                failing = False
            await asyncio.sleep(max(pause, PAUSE) if failing else pause)

    async def purge(self) -> None:
        """Empty the earlier events and letters of rows that were deleted. Raises one of DATABASE_ERRORS."""
        while True:
            self._sequencer.deletions.clear()
            try:
                [done] = await self._fetch("purge", ROWS)
            except BaseException:
                self._sequencer.deletions.set()
                raise
            metrics.PURGED.inc(done["emptied"])
            if done["rows"] < ROWS:
                return

    async def sweep(self) -> None:
        """Open the next segment in time, make one ahead, and drop what is too old. Raises one of DATABASE_ERRORS."""
        await self._fetch("retire_segments", self._keep)
        expired = [row["statement"] for row in await self._fetch("expired")]
        if expired:
            connection = await self._connect()
            try:
                for statement in expired:
                    await connection.execute(statement, timeout=DROP_TIMEOUT)
            finally:
                connection.terminate()
            log.info("segments_dropped", tables=sum(statement.startswith("drop") for statement in expired))
        await self._fetch("make_segment")
        [[due]] = await self._fetch("segment_due", self._keep / SEGMENTS)
        if due:
            self._sequencer.open_next_segment()

    async def look(self) -> None:
        """See how far the log has been dropped. Raises one of DATABASE_ERRORS."""
        [segments] = await self._fetch("segments")
        metrics.SEGMENTS_AHEAD.set(segments["ahead"])
        metrics.LOG_FLOOR.set(segments["floor"])
        self._forgotten(Seq(segments["floor"]))

    async def _fetch(self, name: str, *arguments: object) -> list[asyncpg.Record]:
        async with acquired(self._pool, CLEANUP_TIMEOUT) as connection:
            return await connection.fetch(query(name), *arguments)
