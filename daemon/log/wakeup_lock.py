"""The lock that says whether writers have to ring: they share it, or the leader holds it alone, and is asleep."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from daemon.log.queries import query
from daemon.postgres.backoff import backoff_delay
from daemon.postgres.connect import Connect, Connection
from daemon.postgres.errors import DATABASE_ERRORS

WAKEUP_LOCK: Final = 0x526F7763617375  # an advisory lock of the database; triggers/rowcast.sql says the same number
ANSWER_TIMEOUT: Final = 30.0  # seconds


class WakeupLock:
    """Holds the lock while it is wanted, on a connection of its own.

    `changed` is called when it has been granted, and when it is held no more: both count as a ring. If the connection
    breaks the lock is lost, and asked for again on a new one.
    """

    def __init__(self, connect: Connect, changed: Callable[[], None]) -> None:
        self.held = False
        self._connect = connect
        self._changed = changed
        self._wanted = False
        self._turn = asyncio.Event()

    def want(self, wanted: bool) -> None:
        """Ask for the lock, or let go of it, soon."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._turn.set()

    async def run(self) -> None:
        """Do what is wanted until cancelled."""
        attempt = 0
        while True:
            with suppress(*DATABASE_ERRORS):
                connection = await self._connect()
                attempt = 0
                try:
                    await connection.execute(query("wait_without_timeout"), timeout=ANSWER_TIMEOUT)
                    await self._serve(connection)
                finally:
                    connection.terminate()
                    self._set(held=False)
            await asyncio.sleep(backoff_delay(attempt))
            attempt += 1

    async def _serve(self, connection: Connection) -> None:
        """One connection's life. Returns, or raises one of DATABASE_ERRORS, when it is over."""
        connection.add_termination_listener(lambda _: self._turn.set())
        while not connection.is_closed():
            self._turn.clear()
            if self._wanted and not self.held:
                await self._ask(connection)
            elif self.held and not self._wanted:
                self._set(held=False)
                await connection.execute(query("release_wakeup_lock"), timeout=ANSWER_TIMEOUT)
            else:
                await self._turn.wait()

    async def _ask(self, connection: Connection) -> None:
        """Wait for the lock until it is not wanted any more."""
        asking = asyncio.create_task(connection.execute(query("take_wakeup_lock"), WAKEUP_LOCK))
        turn = asyncio.create_task(self._turn.wait())
        try:
            await asyncio.wait({asking, turn}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.cancel()
            asking.cancel()
            await asyncio.wait({asking, turn})
        if asking.cancelled():  # it may have been granted at that very moment
            await connection.execute(query("release_wakeup_lock"), timeout=ANSWER_TIMEOUT)
        else:
            asking.result()
            self._set(held=True)

    def _set(self, *, held: bool) -> None:
        if held != self.held:
            self.held = held
            self._changed()
