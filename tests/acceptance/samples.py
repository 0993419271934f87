"""A daemon with the sample data of `daemon up`, for tests of its pages."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.support.daemon import Daemon, daemon_process
from tests.support.postgres import Server


@dataclass(frozen=True)
class Samples:
    """The daemon, and the DSN of its database."""

    daemon: Daemon
    dsn: str

    @classmethod
    @asynccontextmanager
    async def serving(cls, postgres: Server, data_dir: Path) -> AsyncIterator[Self]:
        """Serve until the block ends."""
        async with (
            postgres.chatgenius() as dsn,
            daemon_process(dsn, "up", "--data-dir", str(data_dir)) as daemon,
        ):
            yield cls(daemon, dsn)
