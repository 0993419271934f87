"""Writes the canary row."""

from typing import Final

from daemon.log.queries import query
from daemon.log.reader import translated
from daemon.postgres.connect import Pool, acquired

WRITE_TIMEOUT: Final = 8.0  # seconds


class CanaryWriter:
    """Writes the row of `rowcast.canary`, whose trigger captures it."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    async def write(self, mark: str) -> None:
        """Commit the row with this mark. Raises LogUnavailable."""
        with translated():
            async with acquired(self._pool, WRITE_TIMEOUT) as connection:
                await connection.execute(query("write_canary"), mark)
