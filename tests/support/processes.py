"""Real processes for the tests, and a way to wait for their end."""

import asyncio
import multiprocessing
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from daemon.embedded.server import EmbeddedPostgres
from tests.support.postgres import chosen_binaries


@contextmanager
def until_it_ends(pid: int) -> Iterator[None]:
    """Waits at the end of the block until the process, which must be running at its beginning, has ended."""
    process = os.pidfd_open(pid)
    try:
        yield
        select.select([process], [], [])
    finally:
        os.close(process)


@dataclass(frozen=True)
class Holder:
    """A process that runs its own embedded Postgres."""

    process: BaseProcess
    _reports: Connection

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def started(self) -> tuple[int, str]:
        """Waits for the server; its pid and DSN."""
        pid, dsn = self._reports.recv()
        return int(pid), str(dsn)

    def kill(self) -> None:
        """Kill it with SIGKILL and wait for its end."""
        self.process.kill()
        self.process.join()


@contextmanager
def holder_of(data_dir: Path) -> Iterator[Holder]:
    """Another process that starts Postgres on `data_dir`; killed at the end."""
    context = multiprocessing.get_context("spawn")
    reports, reporter = context.Pipe(duplex=False)
    process = context.Process(target=_hold, args=(data_dir, reporter))
    process.start()
    reporter.close()  # so that `started` fails, and does not wait, if the process ends
    holder = Holder(process, reports)
    try:
        yield holder
    finally:
        holder.kill()
        process.close()
        reports.close()


def _hold(data_dir: Path, reporter: Connection) -> None:
    async def hold() -> None:
        async with EmbeddedPostgres(data_dir, binaries=chosen_binaries()) as postgres:
            reporter.send((postgres.pid, postgres.dsn))
            await asyncio.Event().wait()

    asyncio.run(hold())
