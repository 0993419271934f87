"""The LISTEN connection: it hears the rings, proves that it hears, and comes back when it does not."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial

from daemon import metrics
from daemon.logs import get_logger
from daemon.postgres.connect import Connection
from daemon.postgres.event_log import BROKEN, reason
from daemon.postgres.queries import query

log = get_logger()

Connect = Callable[[], Awaitable[Connection]]

LONGEST_PAUSE = 30.0  # seconds between attempts to reconnect


class Doorbell:
    """Sets an event for each ring of its channel.

    `bells`: channel -> the event to set. Every `beat_every` seconds a beat goes through Postgres and back;
    without an echo for `beat_limit` seconds the connection is given up and opened again. After every LISTEN all
    bells are rung once: what came before it is not known here. What a backend rings of which `is_own` is true is not
    heard: whoever sent it knows already.
    """

    def __init__(
        self,
        connect: Connect,
        bells: Mapping[str, asyncio.Event],
        *,
        is_own: Callable[[int], bool] = lambda _: False,
        beat_every: float = 5.0,
        beat_limit: float = 15.0,
    ) -> None:
        self._connect = connect
        self._bells = bells
        self._is_own = is_own
        self._beat_every = beat_every
        self._beat_limit = beat_limit
        self._beaten = float("-inf")
        self.listening = asyncio.Event()
        self.backend_pid: int | None = None

    @property
    def silence(self) -> float:
        """Seconds since the last echo of a beat; infinite before the first."""
        return time.monotonic() - self._beaten

    @property
    def hears(self) -> bool:
        """Is the connection proven to hear?"""
        return self.listening.is_set() and self.silence < self._beat_limit

    async def run(self) -> None:
        """Listen until cancelled."""
        attempt = 0
        while True:
            try:
                await self._listen()
            except BROKEN as error:
                if self.listening.is_set():
                    attempt = 0
                    log.warning("listener_lost", reason=reason(error))
                elif attempt == 0:
                    log.warning("listener_lost", reason=reason(error))
            finally:
                self.listening.clear()
                self.backend_pid = None
                metrics.LISTENER_CONNECTED.set(0)
            # Full jitter: after a restart of Postgres not all daemons knock at once.
            await asyncio.sleep(random.uniform(0, min(LONGEST_PAUSE, 0.2 * 2**attempt)))  # noqa: S311
            attempt += 1

    def _rung(self, bell: asyncio.Event, _: object, pid: int, *__: object) -> None:
        if not self._is_own(pid):
            bell.set()

    async def _listen(self) -> None:
        """One connection's life. Returns or raises one of BROKEN when it is over."""
        connection = await self._connect()
        try:
            echo, ended = asyncio.Event(), asyncio.Event()

            def end(_: object) -> None:
                ended.set()
                echo.set()  # nobody waits for an echo any more

            connection.add_termination_listener(end)
            self.backend_pid = connection.get_server_pid()
            beat_channel = f"rowcast_beat_{self.backend_pid}"
            async with asyncio.timeout(self._beat_limit):
                await connection.add_listener(beat_channel, lambda *_: echo.set())
                for channel, bell in self._bells.items():
                    await connection.add_listener(channel, partial(self._rung, bell))
            while not ended.is_set():
                echo.clear()
                async with asyncio.timeout(self._beat_limit - self._beat_every):
                    row = await connection.fetchrow(query("beat"), beat_channel)
                    await echo.wait()
                if ended.is_set():
                    break
                self._beaten = time.monotonic()
                if row is not None:
                    metrics.QUEUE_USAGE.set(row["usage"])
                if not self.listening.is_set():
                    self.listening.set()
                    metrics.LISTENER_CONNECTED.set(1)
                    log.info("listener_connected", backend_pid=self.backend_pid)
                    for bell in self._bells.values():
                        bell.set()
                # Not wait_for: in Python 3.11 it can swallow a cancellation.
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._beat_every):
                        await ended.wait()
            raise ConnectionResetError
        finally:
            connection.terminate()  # close() would wait for a peer that may be gone
