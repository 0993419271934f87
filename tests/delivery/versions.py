"""A log of eight rows with three versions each, whose reads a test can hold up."""

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from daemon.core.change import Position, Seq, Topic
from daemon.core.hub import Hub
from daemon.core.ports import Batch
from daemon.delivery.pack_router import PackRouter
from daemon.log.reader import PgLogReader
from daemon.packs import Pack, Row
from daemon.postgres.connect import Connection, Pool, open_pool
from tests.support.log import ROWS, leader, until_numbered


class Version(Row):
    id: int
    version: int


SERVED = PackRouter({"app": Pack("app", {"rows": Version}, (r"row:\d+",))})
ONE, TWO, THREE = (Topic(f"row:{number}") for number in (1, 2, 3))


class GatedLog(PgLogReader):
    """The real log. A read waits before it returns, until the test sets `go`."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.reading = asyncio.Event()
        self.go = asyncio.Event()

    async def read_topics(self, topics: Collection[Topic], after: Seq, upto: Seq, limit: int) -> Batch:
        found = await super().read_topics(topics, after, upto, limit)
        self.reading.set()
        await self.go.wait()
        return found


@asynccontextmanager
async def versions(database: str, sql: Connection) -> AsyncIterator[Pool]:
    """A pool on a log in which each of eight rows has the versions 1 to 3, one transaction for each version."""
    await sql.execute(ROWS)
    pool = await open_pool(database, application_name="test", max_size=5)
    async with leader(database, pool):
        for version in (1, 2, 3):
            await sql.execute("update app.rows set version = $1", version)
        await until_numbered(pool)
    yield pool
    await pool.close()


async def a_hub(pool: Pool) -> Hub:
    """A hub at the head, which ends each frame with a newline."""
    hub = Hub(lambda payload: payload + b"\n", SERVED.with_exact_numbers)
    head = await PgLogReader(pool).head()
    hub.move(Position(head.epoch, Seq(24)), "epoch")
    return hub
