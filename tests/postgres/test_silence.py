"""Tasks that wait for a database that has stopped answering can be cancelled, and end at once."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

import pytest

from daemon.core.change import Change, Kind, Position, Seq, Topic
from daemon.log.dead_letters import DeadLetters
from daemon.log.grants import PgGrants
from daemon.log.notifier import Notifier
from daemon.log.reader import PgLogReader
from daemon.log.retention import Retention
from daemon.log.sequencer import Sequencer
from daemon.postgres.connect import SESSION, Connect, Pool, connect, open_pool
from daemon.schema.health import SchemaHealth
from daemon.settings import Settings
from tests.faults.harness import dsn_through, socket_of
from tests.faults.proxy import Proxy
from tests.support.postgres import Server

STOP_TIMEOUT = 10.0  # seconds for a cancelled task to end

INVALID = Change(
    seq=Seq(1),
    tx="1",
    at="2026-01-01T00:00:00Z",
    schema="chatgenius",
    table="messages",
    model="",
    topic=Topic("channel:1"),
    kind=Kind.INSERT,
    key="{}",
    record="{}",
    changed=(),
    actor=None,
    ends=None,
)


@dataclass
class Client:
    """A part of the daemon that uses the database. `answered` is set once that has worked."""

    work: Callable[[], Awaitable[object]]
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Repeat the work until cancelled. A part that runs forever does so in the first round."""
        while True:
            await self.work()
            self.answered.set()


def listener(dsn: str, _: Pool) -> Client:
    notifier = Notifier(opening(dsn), {"rowcast": asyncio.Event()}, beat_every=0.01, beat_limit=3600)
    return Client(notifier.run, notifier.listening)


def leader(dsn: str, pool: Pool) -> Client:
    sequencer = Sequencer(opening(dsn), pool, asyncio.Event(), asyncio.Event(), poll_every=0.01)
    return Client(sequencer.run, sequencer.leading)


def opening(dsn: str) -> Connect:
    return partial(connect, dsn, application_name="test", server_settings=SESSION, attempts=1)


def retention(dsn: str, pool: Pool) -> Retention:
    sequencer = Sequencer(opening(dsn), pool, asyncio.Event(), asyncio.Event())
    return Retention(pool, opening(dsn), sequencer, timedelta(days=7))


TOPIC = Topic("channel:1")
CLIENTS: dict[str, Callable[[str, Pool], Client]] = {
    "listens": listener,
    "leads": leader,
    "purges": lambda dsn, pool: Client(retention(dsn, pool).purge),
    "sweeps": lambda dsn, pool: Client(retention(dsn, pool).sweep),
    "checks the floor": lambda dsn, pool: Client(retention(dsn, pool).check_floor),
    "checks the schemas": lambda _, pool: Client(SchemaHealth(pool, Settings()).refresh),
    "reads the head": lambda _, pool: Client(PgLogReader(pool).head),
    "reads the log": lambda _, pool: Client(lambda: PgLogReader(pool).read(Seq(0), 10)),
    "replays": lambda _, pool: Client(lambda: PgLogReader(pool).read_topics([TOPIC], Seq(0), Seq(10), 10)),
    "checks continuity": lambda _, pool: Client(lambda: PgLogReader(pool).continuity(Position("", Seq(0)))),
    "looks up rights": lambda _, pool: Client(
        lambda: PgGrants(pool, lambda _: "chatgenius").readable_from("u1", TOPIC)
    ),
    "stores dead letters": lambda _, pool: Client(
        lambda: DeadLetters(pool).store_dead_letters([(INVALID, "chatgenius", "why")])
    ),
}


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.mark.parametrize("begun", [False, True], ids=["from the beginning", "after an answer"])
@pytest.mark.parametrize("name", CLIENTS)
async def test_a_task_that_waits_for_a_silent_database_can_be_cancelled(
    database: str, name: str, begun: bool
) -> None:
    async with Proxy(socket_of(database)).serving() as proxy:
        dsn = dsn_through(proxy, database)
        pool = await open_pool(dsn, application_name="test", max_size=2)
        client = CLIENTS[name](dsn, pool)
        if not begun:
            proxy.hold()
        waiting = asyncio.create_task(client.run())
        if begun:
            await client.answered.wait()
            proxy.hold()
        await proxy.up.holds.wait()
        waiting.cancel()
        async with asyncio.timeout(STOP_TIMEOUT):
            await asyncio.gather(waiting, return_exceptions=True)
        pool.terminate()
