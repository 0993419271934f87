"""The leader's pump: it delivers the changes that it is offered or reads, each of them once."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from daemon.core.change import Change, Seq, Topic
from daemon.core.hub import Hub
from daemon.core.ports import Batch
from daemon.delivery import pump
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.pump import Pump
from daemon.log.reader import PgLogReader
from daemon.packs import Pack, Row
from daemon.postgres.connect import Connection, Pool
from tests.support.followers import Follower
from tests.support.log import leader, until_numbered

pytestmark = pytest.mark.usefixtures("rows")

ONE = Topic("row:1")
CHUNK = 4


class Version(Row):
    id: int
    version: int


class GatedLog(PgLogReader):
    """The real log. While the gate is closed, a read waits before it returns what it has found."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.reads = 0
        self.answers = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def read(self, after: Seq, limit: int) -> Batch:
        self.reads += 1
        found = await super().read(after, limit)
        await self.gate.wait()
        self.answers += 1
        return found


class PumpHarness:
    """A pump that does not poll, and a follower of what it delivers."""

    def __init__(self, log: GatedLog, router: PackRouter) -> None:
        self.log = log
        self.dead_letters: list[tuple[Change, str, str]] = []
        self.storing = asyncio.Event()
        self.may_store = asyncio.Event()
        self.may_store.set()
        self.wakeup = asyncio.Event()
        self.hub = Hub(lambda payload: payload + b"\n", router.with_exact_numbers)
        self.live = Live(self.hub, router, LogCache(log, 0))
        self.follower = Follower()
        self.pump = Pump(
            log,
            self.wakeup,
            self.live,
            self._store_dead_letters,
            poll_every=3600,
            chunk=CHUNK,
        )

    async def _store_dead_letters(self, dead_letters: Sequence[tuple[Change, str, str]]) -> None:
        self.storing.set()
        await self.may_store.wait()
        self.dead_letters += dead_letters

    def versions(self) -> list[int]:
        lines = b"".join(self.follower.frames).decode().split('"version":')[1:]
        return [int(line.partition("}")[0]) for line in lines]


@asynccontextmanager
async def pumping(database: str, pool: Pool, *models: str) -> AsyncIterator[PumpHarness]:
    """A leader that offers its changes to an idle pump."""
    tables = dict.fromkeys(models or ["rows"], Version)
    harness = PumpHarness(GatedLog(pool), PackRouter({"app": Pack("app", tables, (r"row:\d+",))}))
    async with leader(database, pool, numbers=harness.wakeup, offer=harness.pump.offer, max_offered=CHUNK):
        task = asyncio.create_task(harness.pump.run())
        await harness.pump.started.wait()
        while not harness.log.answers:
            await asyncio.sleep(0)
        harness.hub.follow(ONE, harness.follower)
        harness.log.reads = 0
        try:
            yield harness
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def write(sql: Connection, *versions: int) -> None:
    for version in versions:
        await sql.execute("update app.rows set version = $1 where id = 1", version)


async def test_offered_changes_are_delivered_without_reading_the_log(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool) as harness:
        for version in range(1, 6):
            await write(sql, version)
            await harness.live.wait_until_delivered(Seq(version))
        assert [1, 2, 3, 4, 5] == harness.versions()
        assert 0 == harness.log.reads


async def test_changes_offered_during_a_read_are_delivered_at_once_and_only_once(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool) as harness:
        harness.log.gate.clear()
        harness.wakeup.set()
        while not harness.log.reads:
            await asyncio.sleep(0)
        for version in range(1, 4):
            await write(sql, version)
            await harness.live.wait_until_delivered(Seq(version))
        assert [1, 2, 3] == harness.versions()
        harness.log.gate.set()
        await write(sql, 4)
        await harness.live.wait_until_delivered(Seq(4))
        assert [1, 2, 3, 4] == harness.versions()


async def test_changes_read_before_they_are_offered_are_delivered_once(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool) as harness:
        await sql.execute("update app.rows set version = 1")  # more than the leader offers: the pump reads it
        await harness.live.wait_until_delivered(Seq(8))
        harness.pump.offer(Seq(0), await harness.log.read(Seq(0), 1))
        await write(sql, 2)
        await harness.live.wait_until_delivered(Seq(9))
        assert [1, 2] == harness.versions()


async def test_changes_offered_while_older_ones_are_read_follow_them(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool) as harness:
        harness.log.gate.clear()
        await sql.execute("update app.rows set version = 1")  # more than the leader offers
        while not harness.log.reads:
            await asyncio.sleep(0)
        limit = 3 * CHUNK
        for version in range(2, limit):  # more than the pump keeps of what it is offered
            await write(sql, version)
            await until_numbered(pool)
        assert [] == harness.versions()
        assert sum(len(changes) for _, changes in harness.pump._offered) <= CHUNK + 1
        harness.log.gate.set()
        await harness.live.wait_until_delivered(Seq(8 + limit - 2))
        assert list(range(1, limit)) == harness.versions()


async def test_an_offered_change_that_is_invalid_becomes_a_dead_letter(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool, "other") as harness:
        await write(sql, 1)
        await harness.live.wait_until_delivered(Seq(1))
        while not harness.dead_letters:
            await asyncio.sleep(0)
        assert [] == harness.versions()
        assert [(Seq(1), "app", "table: no_row_model")] == [
            (c.seq, pack, why) for c, pack, why in harness.dead_letters
        ]


async def test_a_change_that_no_frame_can_hold_resets_its_topic_and_stops_no_other(
    database: str, pool: Pool, sql: Connection
) -> None:
    def encode(payload: bytes) -> bytes:
        if b'"version":2' in payload:
            raise MemoryError
        return payload + b"\n"

    async with pumping(database, pool) as harness:
        harness.hub._encode = encode
        with capture_logs() as logged:
            for version in range(1, 4):
                await write(sql, version)
                await harness.live.wait_until_delivered(Seq(version))
        frames = [json.loads(line) for line in b"".join(harness.follower.frames).splitlines()]
        assert ["changes", "reset", "changes"] == [frame["op"] for frame in frames]
        positions = [frame["pos"] for frame in frames]
        assert positions[1] == frames[2]["prev"]
        while not harness.dead_letters:
            await asyncio.sleep(0)
        assert [(Seq(2), "frame: cannot_be_built")] == [(change.seq, why) for change, _, why in harness.dead_letters]
    assert ["internal_error"] == [line["event"] for line in logged if line["log_level"] == "error"][:1]


async def test_a_read_that_hangs_makes_the_daemon_unready_and_its_clients_stale(
    database: str, pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "MAX_AGE", 0.05)
    async with pumping(database, pool) as harness:
        harness.log.gate.clear()
        harness.wakeup.set()
        while not harness.pump.problems():
            await asyncio.sleep(0)
        assert ["the log is not being read (no answer)"] == harness.pump.problems()
        assert harness.pump.read_age > 0.05
        harness.log.gate.set()
        while harness.pump.problems():
            harness.wakeup.set()
            await asyncio.sleep(0)


async def test_a_log_that_is_read_but_cannot_be_continued_makes_the_daemon_unready_and_says_why(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pump, "MAX_AGE", 0.05)
    async with pumping(database, pool) as harness:
        await sql.execute("update app.rows set version = 1")
        await harness.live.wait_until_delivered(Seq(8))
    async with leader(database, pool):
        await write(sql, 2)
        await until_numbered(pool)
    task = asyncio.create_task(harness.pump.run())
    await sql.execute("alter function rowcast.log_floor() rename to elsewhere")
    with capture_logs() as logged:
        while ["the log is not being read (UndefinedFunctionError 42883)"] != harness.pump.problems():
            harness.wakeup.set()
            await asyncio.sleep(0)
    assert ["log_unavailable"] == [line["event"] for line in logged]
    await sql.execute("alter function rowcast.elsewhere() rename to log_floor")
    while harness.pump.problems():
        harness.wakeup.set()
        await asyncio.sleep(0)
    assert [1, 2] == harness.versions()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_nothing_is_delivered_before_an_earlier_invalid_change_is_stored(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(
        "create table app.other (id integer primary key); select rowcast.watch('app.other', $$'row:1'$$, '{id}')"
    )
    async with pumping(database, pool) as harness:
        harness.log.gate.clear()
        harness.wakeup.set()
        while not harness.log.reads:  # a read is under way
            await asyncio.sleep(0)
        harness.may_store.clear()
        await sql.execute("insert into app.other values (1)")
        await harness.live.wait_until_delivered(Seq(1))
        await write(sql, 1)
        await until_numbered(pool)
        harness.log.gate.set()
        await harness.storing.wait()
        assert [] == harness.versions()
        harness.may_store.set()
        await harness.live.wait_until_delivered(Seq(2))
        assert [1] == harness.versions()
        assert [Seq(1)] == [change.seq for change, _, _ in harness.dead_letters]
