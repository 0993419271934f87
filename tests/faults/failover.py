"""A failover to a standby that lags, while clients are connected and away."""

import asyncio
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.faults.checker import Checker, Reset
from tests.faults.harness import NOWHERE, Scenario, Server
from tests.faults.proxy import Proxy
from tests.support.postgres import passable_directory

HOW: Final = (
    "`pg_basebackup -R`; the standby is stopped, writes continue, the primary is killed, the standby is promoted"
)


@asynccontextmanager
async def standby_of(server: Server) -> AsyncIterator[Server]:
    """A physical standby that is stopped: it never receives anything written from now on."""
    with passable_directory() as directory:
        cluster = server.directory / "postgres"
        password = shutil.copy(server.directory / "postgres.password", directory)
        process = await asyncio.create_subprocess_exec(
            str(server.binaries.bindir / "pg_basebackup"),
            *("--pgdata", str(directory / "postgres"), "--write-recovery-conf", "--checkpoint=fast"),
            *("--host", str(server.socket.parent), "--username", "rowcast"),
            env=server.binaries.environment() | {"PGPASSWORD": Path(password).read_text()},
        )
        assert 0 == await process.wait()
        owner = cluster.stat()
        for path in (Path(password), directory / "postgres", *(directory / "postgres").rglob("*")):
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        standby = Server(directory, binaries=server.binaries)
        try:
            yield standby
        finally:
            await standby.embedded.stop()


@dataclass
class Failover:
    """A failover that has happened. Clients that were away return once they may."""

    run: Scenario
    url: Callable[[], str]
    clients: Sequence[Checker] = ()
    may_return: bool = True
    began: float = field(default_factory=time.monotonic)

    def let_return(self) -> None:
        """Let those return that are away."""
        self.may_return = True

    def url_of_those_away(self) -> str:
        """Where they connect; nowhere while they are away."""
        return self.url() if self.may_return else NOWHERE

    @property
    def seconds(self) -> float:
        """Since the primary was killed."""
        return time.monotonic() - self.began

    async def lost(self) -> int:
        """Acknowledged writes that the standby does not have."""
        return len(self.run.oracle.acknowledged - (await self.run.oracle.truth()).keys())

    def resets(self) -> list[int]:
        """How many each client got, for each of its topics."""
        return [
            sum(isinstance(event, Reset) and event.topic == topic for event in checker.history)
            for checker in self.clients
            for topic in checker.topics
        ]


@asynccontextmanager
async def failover(
    server: Server, proxy: Proxy, run: Scenario, url: Callable[[], str], count: int
) -> AsyncIterator[Failover]:
    """Two clients are away, and `count` others connected at `url`, while a standby takes the place of the primary."""
    now, failed = server, Failover(run, url)
    run.oracle.move(lambda: now.dsn)
    away = await run.follow(2, url=failed.url_of_those_away)
    failed.clients = [*await run.follow(count, url=url), *away]
    run.write(2)
    await run.received(50)
    async with standby_of(server) as standby:
        await run.received(100)
        failed.may_return = False
        for checker in away:
            assert checker.connection is not None
            checker.connection.transport.abort()
        await run.received(50, failed.clients[0])
        failed.began = time.monotonic()
        await server.crash()
        await standby.start()
        proxy.target, now = standby.socket, standby
        assert await standby.fetchval("select pg_promote(true, 60)")
        yield failed
