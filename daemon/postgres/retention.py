"""What the log forgets: earlier content of rows that were deleted, at once; and everything, once it is old enough."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Final

from daemon import metrics
from daemon.core.change import Seq
from daemon.logs import get_logger
from daemon.postgres.connect import Pool
from daemon.postgres.doorbell import Connect
from daemon.postgres.event_log import BROKEN, reason
from daemon.postgres.queries import query
from daemon.postgres.sequencer import Sequencer

log = get_logger()

SEGMENTS: Final = (
    4  # that one retention is cut into: with more of them less is kept for too long, but each read looks at all
)
ROWS: Final = 1000  # deleted rows whose content goes in one transaction
PAUSE: Final = 1.0  # seconds from a failure to the next attempt

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
            group.create_task(self._for_ever(self._sequencer.gone, self.purge, 0))
            group.create_task(self._for_ever(self._sequencer.leading, self.sweep, self._look_every))
            group.create_task(self._for_ever(self._sequencer.settled, self.look, self._look_every))

    async def _for_ever(self, due: asyncio.Event, work: Callable[[], Awaitable[None]], pause: float) -> None:
        failing = False
        while True:
            await due.wait()
            try:
                await work()
            except BROKEN as error:
                if not failing:
                    log.warning("retention_failed", reason=reason(error))
                failing = True
            else:
                failing = False
            await asyncio.sleep(max(pause, PAUSE) if failing else pause)

    async def purge(self) -> None:
        """Empty the earlier events and letters of rows that were deleted. Raises one of BROKEN."""
        while True:
            self._sequencer.gone.clear()
            try:
                async with self._pool.acquire() as connection, connection.transaction():
                    await connection.execute(query("lock_letters"))
                    done = await connection.fetchrow(query("purge"), ROWS)
            except BaseException:
                self._sequencer.gone.set()
                raise
            assert done is not None
            metrics.PURGED.inc(done["emptied"])
            if done["rows"] < ROWS:
                return

    async def sweep(self) -> None:
        """Open the next segment in time, make one ahead, and drop what is too old. Raises one of BROKEN."""
        pool = self._pool
        await pool.execute(query("retire_segments"), self._keep)
        expired = [row["statement"] for row in await pool.fetch(query("expired"))]
        if expired:
            connection = await self._connect()
            try:
                for statement in expired:
                    await connection.execute(statement)
            finally:
                connection.terminate()
            log.info("segments_dropped", tables=sum(statement.startswith("drop") for statement in expired))
        await pool.execute(query("make_segment"))
        if await pool.fetchval(query("segment_due"), self._keep / SEGMENTS):
            self._sequencer.open_next_segment()

    async def look(self) -> None:
        """See how far the log has been dropped. Raises one of BROKEN."""
        segments = await self._pool.fetchrow(query("segments"))
        assert segments is not None
        metrics.SEGMENTS_AHEAD.set(segments["ahead"])
        metrics.LOG_FLOOR.set(segments["floor"])
        self._forgotten(Seq(segments["floor"]))
