"""Why notifications do not pass: another transaction holds the lock of NOTIFY, or keeps its queue from emptying."""

import asyncio
from collections.abc import Callable
from typing import Final

from daemon import metrics
from daemon.log.queries import query
from daemon.logs import get_logger
from daemon.postgres.connect import Connection, Pool, acquired
from daemon.postgres.errors import DATABASE_ERRORS

log = get_logger()

CHECK_DELAY: Final = 1.0  # seconds between two checks
ANSWER_TIMEOUT: Final = 3.0  # seconds for one check
FULL: Final = 0.9  # of the queue


class NotifyWatch:
    """Finds out who is to blame, while `is_blocked` says that notifications do not pass.

    A transaction that has notified takes one lock of the whole server when it commits, and keeps it until its commit
    is done. If that waits, such as for a standby that does not answer, so does every other one, whatever database it
    is in. And a session that listens, but stays in a transaction, keeps the queue from emptying; once it is full,
    every transaction that has notified fails.
    """

    def __init__(self, pool: Pool, is_blocked: Callable[[], bool]) -> None:
        self._pool = pool
        self._is_blocked = is_blocked
        self._warning = ""

    def warnings(self) -> list[str]:
        """Who blocks NOTIFY, and what to do about it; empty if nobody does."""
        return [self._warning] if self._warning else []

    async def run(self) -> None:
        """Check until cancelled; log when notifications begin to be blocked, and when they pass again."""
        while True:
            warning = await self._find() if self._is_blocked() else ""
            if warning and not self._warning:
                log.warning("notify_blocked", reason=warning)
            elif self._warning and not warning:
                metrics.NOTIFY_WAITERS.set(0)
                log.info("notify_unblocked")
            self._warning = warning
            await asyncio.sleep(CHECK_DELAY)

    async def _find(self) -> str:
        try:
            async with acquired(self._pool, ANSWER_TIMEOUT) as connection:
                return await self._lock(connection) or await self._queue(connection)
        except DATABASE_ERRORS:
            return self._warning  # other parts say that the database does not answer

    async def _lock(self, connection: Connection) -> str:
        found = await connection.fetchrow(query("notify_lock"))
        metrics.NOTIFY_WAITERS.set(found["waiters"] if found else 0)
        if found is None or not found["waiters"]:
            return ""
        doing = f", waiting for {found['waits_for']}" if found["waits_for"] else ""
        return (
            f"process {found['pid']} of Postgres holds the lock of NOTIFY{doing}, and transactions that have "
            f"notified wait for it; the log is polled meanwhile. If it hangs: {_end(found['pid'])}"
        )

    async def _queue(self, connection: Connection) -> str:
        found = await connection.fetchrow(query("notify_queue"))
        if found is None or found["usage"] < FULL:
            return ""
        remedy = f" The oldest transaction is that of process {found['oldest']}: {_end(found['oldest'])}"
        return (
            f"the queue of NOTIFY is {found['usage']:.0%} full, because a session that listens has stayed in a "
            f"transaction; the log is polled meanwhile.{remedy if found['oldest'] else ''}"
        )


def _end(pid: int) -> str:
    return f"select pg_terminate_backend({pid})"
