"""The wakeup lock: shared by writers while the leader polls, held by the leader alone while it sleeps."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from daemon.log.queries import query
from daemon.postgres.backoff import backoff_delay
from daemon.postgres.connect import Connect, Connection
from daemon.postgres.errors import DATABASE_ERRORS, cancellation_first

WAKEUP_LOCK: Final = 0x526F7763617375  # an advisory lock of the database; triggers/rowcast.sql has the same number
ANSWER_TIMEOUT: Final = 30.0  # seconds


class WakeupLock:
    """Holds the lock while it is wanted, on a connection of its own.

    `changed` is called when the lock has been granted or released: both count as a wakeup. If the connection breaks,
    the lock is lost and is requested again on a new one.
    """

    def __init__(self, connect: Connect, changed: Callable[[], None]) -> None:
        self.held = False
        self._connect = connect
        self._changed = changed
        self._wanted = False
        self._wakeup = asyncio.Event()  # `_wanted` has changed, or the connection has ended

    def want(self, wanted: bool) -> None:
        """Request the lock, or release it, soon."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._wakeup.set()

    async def run(self) -> None:
        """Take and release the lock as wanted until cancelled."""
        attempt = 0
        while True:
            with suppress(*DATABASE_ERRORS), cancellation_first():
                connection = await self._connect()
                attempt = 0
                try:
                    await connection.execute(query("wait_without_timeout"), timeout=ANSWER_TIMEOUT)
                    await self._use(connection)
                finally:
                    connection.terminate()
                    self._set(held=False)
            await asyncio.sleep(backoff_delay(attempt))
            attempt += 1

    async def _use(self, connection: Connection) -> None:
        """Take and release the lock on one connection, until it ends. May raise one of DATABASE_ERRORS."""
        connection.add_termination_listener(lambda _: self._wakeup.set())
        while not connection.is_closed():
            self._wakeup.clear()
            if self._wanted and not self.held:
                await self._take(connection)
            elif self.held and not self._wanted:
                self._set(held=False)
                await connection.execute(query("release_wakeup_lock"), timeout=ANSWER_TIMEOUT)
            else:
                await self._wakeup.wait()

    async def _take(self, connection: Connection) -> None:
        """Wait until the lock is granted, or is not wanted any more."""
        request = asyncio.create_task(connection.execute(query("take_wakeup_lock"), WAKEUP_LOCK))
        woken = asyncio.create_task(self._wakeup.wait())
        try:
            await asyncio.wait({request, woken}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            woken.cancel()
            request.cancel()
            await asyncio.wait({request, woken})
        if request.cancelled():  # the lock may have been granted at that very moment
            await connection.execute(query("release_wakeup_lock"), timeout=ANSWER_TIMEOUT)
        else:
            request.result()
            self._set(held=True)

    def _set(self, *, held: bool) -> None:
        if held != self.held:
            self.held = held
            self._changed()
