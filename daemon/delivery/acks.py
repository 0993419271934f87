"""Acknowledged positions: the last one of each device, stored in batches."""

import asyncio
from typing import Final

from daemon.core.change import Position
from daemon.core.errors import LogUnavailable
from daemon.core.ports import AckStore
from daemon.core.presence import Key
from daemon.health import Progress
from daemon.logs import get_logger

log = get_logger()

INTERVAL: Final = 1.0  # seconds between two writes
MAX_WAITING: Final = 100_000  # devices whose positions wait while the database does not answer
RECALL_TIMEOUT: Final = 2.0  # seconds: the client has said hello, and waits for its welcome


class Acks:
    """Keeps what clients acknowledge."""

    def __init__(self, store: AckStore) -> None:
        self._store = store
        self._unstored: dict[Key, Position] = {}
        self._wakeup = asyncio.Event()
        self._storing = Progress()

    def record(self, device: Key, position: Position) -> None:
        """The device has processed everything up to this position."""
        if device in self._unstored or len(self._unstored) < MAX_WAITING:
            self._unstored[device] = position
            self._wakeup.set()

    async def recall(self, device: Key) -> Position | None:
        """The last position that the device acknowledged; None if none is known, or the database is silent."""
        if device in self._unstored:
            return self._unstored[device]
        try:
            async with asyncio.timeout(RECALL_TIMEOUT):
                return await self._store.stored(device)
        except (LogUnavailable, TimeoutError) as error:
            log.warning("sharing_failed", what="acknowledgement", reason=str(error) or "no answer")
            return None

    async def run(self) -> None:
        """Store what was acknowledged, until cancelled."""
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            storing = self._unstored.copy()
            try:
                await self._store.store(storing)
            except LogUnavailable as error:
                self._wakeup.set()
                if self._storing.fail(error.reason):
                    log.warning("sharing_failed", what="acknowledgements", reason=error.reason)
            else:
                self._storing.end()
                for device, position in storing.items():
                    if self._unstored[device] == position:
                        del self._unstored[device]
            await asyncio.sleep(INTERVAL)
