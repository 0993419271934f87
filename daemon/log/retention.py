"""Retention: purges earlier content of deleted rows at once, and drops segments of the log once they are old."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import timedelta
from functools import partial
from typing import Any, Final

import asyncpg

from daemon import metrics
from daemon.core.change import Seq
from daemon.health import Progress
from daemon.log.queries import query
from daemon.log.sequencer import Sequencer
from daemon.logs import get_logger
from daemon.postgres.connect import Connect, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS, cancellation_first, describe

log = get_logger()

SEGMENTS: Final = 4  # per retention period. More segments: tighter retention, slower reads
PURGE_ROWS: Final = 100  # deleted rows purged in one transaction
RETRY_DELAY: Final = 1.0  # seconds from a failure to the next attempt
CLEANUP_TIMEOUT: Final = 60.0  # seconds for one statement
DROP_TIMEOUT: Final = 900.0  # seconds to detach or drop a table: that may wait for readers

MAX_AGE: Final = 8.0  # seconds without progress after which a cleanup counts as failing

DROP_SETTINGS: Final = {"lock_timeout": "60s"}
"""Session settings for dropping. A detach waits for readers that began before it, and nothing waits behind it."""


class Retention:
    """Cleans up while `sequencer` leads, and reports the floor of the log whether or not it leads.

    When the sequencer finds deleted rows, their earlier content is purged. Every `check_every` seconds the segments
    that were closed more than `keep` ago are dropped, and the next segment is made ahead and opened in time.
    `on_floor` receives the floor: the last position that has been dropped. `connect` opens a connection with the
    settings DROP_SETTINGS.
    """

    def __init__(
        self,
        pool: Pool,
        connect: Connect,
        sequencer: Sequencer,
        keep: timedelta,
        on_floor: Callable[[Seq], None] = lambda _: None,
        *,
        check_every: float | None = None,
    ) -> None:
        self._pool = pool
        self._connect = connect
        self._sequencer = sequencer
        self._keep = keep
        self._on_floor = on_floor
        self._check_every = check_every or min(60.0, keep.total_seconds() / SEGMENTS / 4)
        self._purging, self._sweeping, self._checking = Progress(), Progress(), Progress()
        for work, progress in (("purge", self._purging), ("sweep", self._sweeping), ("floor", self._checking)):
            metrics.RETENTION_DELAY.labels(work=work).set_function(partial(getattr, progress, "age"))

    def problems(self) -> list[str]:
        """What makes this daemon unready: content that should be gone stays, or the log grows without end."""
        problems = []
        if self._purging.age > MAX_AGE:
            problems.append(f"content of deleted rows is not being removed ({self._purging.failure or 'no answer'})")
        if self._sweeping.age > max(self._keep.total_seconds(), MAX_AGE):
            problems.append(f"old segments are not being dropped ({self._sweeping.failure or 'no answer'})")
        return problems

    def warnings(self) -> list[str]:
        """What an operator should know, although it does not make this daemon unready."""
        return [
            f"{what} ({progress.failure or 'no answer'})"
            for what, progress in (
                ("old segments are not being dropped", self._sweeping),
                ("the floor of the log is not being read", self._checking),
            )
            if progress.age > MAX_AGE
        ]

    async def run(self) -> None:
        """Purge, drop and report until cancelled."""
        sequencer, pause = self._sequencer, self._check_every
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(sequencer.deletions, self.purge, self._purging, 0))
            group.create_task(self._repeat(sequencer.leading, self.sweep, self._sweeping, pause))
            group.create_task(self._repeat(sequencer.settled, self.check_floor, self._checking, pause))

    async def _repeat(
        self, due: asyncio.Event, work: Callable[[], Coroutine[Any, Any, None]], progress: Progress, pause: float
    ) -> None:
        while True:
            if not due.is_set():
                progress.end()
                await due.wait()
            progress.begin()
            try:
                with cancellation_first():
                    await work()
            except DATABASE_ERRORS as error:
                if progress.fail(describe(error)):
                    log.warning("retention_failed", work=work.__name__, reason=progress.failure)
                await asyncio.sleep(max(pause, RETRY_DELAY))
            else:
                progress.end()
                await asyncio.sleep(pause)

    async def purge(self) -> None:
        """Empty earlier events and dead letters of deleted rows. Raises one of DATABASE_ERRORS."""
        while True:
            self._sequencer.deletions.clear()
            try:
                [done] = await self._fetch("purge", PURGE_ROWS)
            except BaseException:
                self._sequencer.deletions.set()
                raise
            metrics.PURGED.inc(done["emptied"])
            self._purging.advance()
            if done["rows"] < PURGE_ROWS:
                return

    async def sweep(self) -> None:
        """Drop old segments, make the next one, and open it when due. Raises one of DATABASE_ERRORS."""
        await self._fetch("retire_segments", self._keep)
        expired = [row["statement"] for row in await self._fetch("expired")]
        if expired:
            connection = await self._connect()
            try:
                for statement in expired:
                    await connection.execute(statement, timeout=DROP_TIMEOUT)
            finally:
                connection.terminate()
            log.info("segments_dropped", tables=sum("drop" in statement for statement in expired))
        await self._fetch("make_segment")
        [[due]] = await self._fetch("segment_due", self._keep / SEGMENTS)
        if due:
            self._sequencer.open_next_segment()

    async def check_floor(self) -> None:
        """Report the floor of the log, and update the metrics. Raises one of DATABASE_ERRORS."""
        [segments] = await self._fetch("segments")
        metrics.SEGMENTS_AHEAD.set(segments["ahead"])
        metrics.LOG_FLOOR.set(segments["floor"])
        self._on_floor(Seq(segments["floor"]))

    async def _fetch(self, name: str, *arguments: object) -> list[asyncpg.Record]:
        async with acquired(self._pool, CLEANUP_TIMEOUT) as connection:
            return await connection.fetch(query(name), *arguments)
