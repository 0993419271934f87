"""The LISTEN connection, which checks itself with heartbeats and reconnects when they stop."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import Final

import asyncpg

from daemon import metrics
from daemon.health import Progress
from daemon.log.queries import query
from daemon.logs import get_logger
from daemon.postgres.backoff import backoff_delay
from daemon.postgres.connect import Connect, Connection
from daemon.postgres.errors import DATABASE_ERRORS, cancellation_first, describe

log = get_logger()

BLOCKED_DELAY: Final = 1.0  # seconds
REFUSALS: Final = (asyncpg.LockNotAvailableError, asyncpg.ProgramLimitExceededError)  # the latter: a full queue


class Notifier:
    """Sets an event for each notification on a channel.

    `wakeups` maps each channel to its event. Every `beat_every` seconds a heartbeat goes through Postgres and back;
    after `beat_limit` seconds without one the connection is replaced. After every LISTEN all events are set once,
    because notifications sent before it are lost. Notifications from backends for which `is_own` is true are ignored.
    `receivers` get the text of what is sent on their channels, but not of what is sent before a LISTEN.

    A heartbeat that the server refuses proves the connection as well: its queue is full, or another transaction has
    held the lock of NOTIFY for longer than `lock_timeout`. Notifications do not pass then, but the log is polled.
    """

    def __init__(
        self,
        connect: Connect,
        wakeups: Mapping[str, asyncio.Event],
        *,
        receivers: Mapping[str, Callable[[str], None]] = MappingProxyType({}),
        is_own: Callable[[int], bool] = lambda _: False,
        beat_every: float = 5.0,
        beat_limit: float = 15.0,
    ) -> None:
        self._connect = connect
        self._wakeups = wakeups
        self._receivers = receivers
        self._is_own = is_own
        self._beat_every = beat_every
        self._beat_limit = beat_limit
        self._echoed_at = float("-inf")
        self._refused_at = float("-inf")
        self._waiting_since: float | None = None  # when the oldest heartbeat was sent that has not come back
        self.listening = asyncio.Event()
        self.backend_pid: int | None = None

    @property
    def silence(self) -> float:
        """Seconds since the last heartbeat came back; infinite before the first."""
        return time.monotonic() - self._echoed_at

    @property
    def is_healthy(self) -> bool:
        """Has a recent heartbeat proven that the connection works?"""
        newest = max(self._echoed_at, self._refused_at)
        return self.listening.is_set() and time.monotonic() - newest < self._beat_limit

    @property
    def is_blocked(self) -> bool:
        """Has a heartbeat not come back for BLOCKED_DELAY? Whoever notifies may have to wait, or fail, then."""
        return self._waiting_since is not None and time.monotonic() - self._waiting_since > BLOCKED_DELAY

    async def run(self) -> None:
        """Listen until cancelled."""
        attempt, progress = 0, Progress()
        while True:
            try:
                with cancellation_first():
                    await self._listen()
            except DATABASE_ERRORS as error:
                if self.listening.is_set():
                    attempt = 0
                    progress.end()
                if progress.fail(describe(error)):
                    log.warning("listener_lost", reason=progress.failure)
            finally:
                self.listening.clear()
                self.backend_pid = None
                metrics.LISTENER_CONNECTED.set(0)
            await asyncio.sleep(backoff_delay(attempt))
            attempt += 1

    def _on_notification(self, wakeup: asyncio.Event, _: object, pid: int, *__: object) -> None:
        if not self._is_own(pid):
            wakeup.set()

    async def _listen(self) -> None:
        """Listen on one connection until it ends. Raises one of DATABASE_ERRORS."""
        connection = await self._connect()
        try:
            echo, ended = asyncio.Event(), asyncio.Event()

            def end(_: object) -> None:
                ended.set()
                echo.set()  # end the wait for an echo

            connection.add_termination_listener(end)
            self.backend_pid = connection.get_server_pid()
            beat_channel = f"rowcast_beat_{self.backend_pid}"
            async with asyncio.timeout(self._beat_limit):
                await connection.add_listener(beat_channel, lambda *_: echo.set())
                for channel, wakeup in self._wakeups.items():
                    await connection.add_listener(channel, partial(self._on_notification, wakeup))
                for channel, receive in self._receivers.items():
                    await connection.add_listener(channel, partial(_on_message, receive))
            while not ended.is_set():
                await self._beat(connection, beat_channel, echo)
                if self._waiting_since is None and not ended.is_set() and not self.listening.is_set():
                    self.listening.set()
                    metrics.LISTENER_CONNECTED.set(1)
                    log.info("listener_connected", backend_pid=self.backend_pid)
                    for wakeup in self._wakeups.values():
                        wakeup.set()
                # Not wait_for: in Python 3.11 it can swallow a cancellation.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._beat_every):
                        await ended.wait()
            raise ConnectionResetError
        finally:
            connection.terminate()  # close() would wait for a peer that may be gone

    async def _beat(self, connection: Connection, channel: str, echo: asyncio.Event) -> None:
        """Send a heartbeat, and wait until it is back or refused. Raises one of DATABASE_ERRORS."""
        echo.clear()
        if self._waiting_since is None:
            self._waiting_since = time.monotonic()
        try:
            async with asyncio.timeout(self._beat_limit - self._beat_every):
                row = await connection.fetchrow(query("send_heartbeat"), channel)
                await echo.wait()
        except REFUSALS:
            self._refused_at = time.monotonic()
            return
        if not connection.is_closed():
            self._waiting_since, self._echoed_at = None, time.monotonic()
        if row is not None:
            metrics.QUEUE_USAGE.set(row["usage"])


def _on_message(
    receive: Callable[[str], None], _connection: object, _pid: int, _channel: str, payload: object
) -> None:
    receive(str(payload))
