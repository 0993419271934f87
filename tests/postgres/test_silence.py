"""Whoever waits for a database that does not answer any more can be told to stop, and stops at once."""

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

WITHIN = 10.0  # seconds after which somebody who does not stop is given up

LETTER = Change(
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
class Asker:
    """Who asks the database while a daemon runs; `answered` is set when that has worked once."""

    work: Callable[[], Awaitable[object]]
    answered: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """Ask again and again. Whoever runs for ever does so in the first round."""
        while True:
            await self.work()
            self.answered.set()


def listener(dsn: str, _: Pool) -> Asker:
    notifier = Notifier(opening(dsn), {"rowcast": asyncio.Event()}, beat_every=0.01, beat_limit=3600)
    return Asker(notifier.run, notifier.listening)


def leader(dsn: str, pool: Pool) -> Asker:
    sequencer = Sequencer(opening(dsn), pool, asyncio.Event(), asyncio.Event(), poll_every=0.01)
    return Asker(sequencer.run, sequencer.leading)


def opening(dsn: str) -> Connect:
    return partial(connect, dsn, application_name="test", server_settings=SESSION, attempts=1)


def house(dsn: str, pool: Pool) -> Retention:
    sequencer = Sequencer(opening(dsn), pool, asyncio.Event(), asyncio.Event())
    return Retention(pool, opening(dsn), sequencer, timedelta(days=7))


TOPIC = Topic("channel:1")
ASKERS: dict[str, Callable[[str, Pool], Asker]] = {
    "listens": listener,
    "leads": leader,
    "purges": lambda dsn, pool: Asker(house(dsn, pool).purge),
    "sweeps": lambda dsn, pool: Asker(house(dsn, pool).sweep),
    "looks for the floor": lambda dsn, pool: Asker(house(dsn, pool).check_floor),
    "looks at the schemas": lambda _, pool: Asker(SchemaHealth(pool, Settings()).refresh),
    "reads the head": lambda _, pool: Asker(PgLogReader(pool).head),
    "reads the log": lambda _, pool: Asker(lambda: PgLogReader(pool).read(Seq(0), 10)),
    "replays": lambda _, pool: Asker(lambda: PgLogReader(pool).read_topics([TOPIC], Seq(0), Seq(10), 10)),
    "asks whether it can go on": lambda _, pool: Asker(lambda: PgLogReader(pool).continuity(Position("", Seq(0)))),
    "asks for rights": lambda _, pool: Asker(
        lambda: PgGrants(pool, lambda _: "chatgenius").readable_from("u1", TOPIC)
    ),
    "buries": lambda _, pool: Asker(lambda: DeadLetters(pool).store_dead_letters([(LETTER, "chatgenius", "why")])),
}


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.mark.parametrize("begun", [False, True], ids=["from the beginning", "after an answer"])
@pytest.mark.parametrize("who", ASKERS)
async def test_whoever_waits_for_a_silent_database_stops_when_told_to(database: str, who: str, begun: bool) -> None:
    async with Proxy(socket_of(database)).serving() as proxy:
        dsn = dsn_through(proxy, database)
        pool = await open_pool(dsn, application_name="test", max_size=2)
        asker = ASKERS[who](dsn, pool)
        if not begun:
            proxy.hold()
        waiting = asyncio.create_task(asker.run())
        if begun:
            await asker.answered.wait()
            proxy.hold()
        await proxy.up.holds.wait()
        waiting.cancel()
        async with asyncio.timeout(WITHIN):
            await asyncio.gather(waiting, return_exceptions=True)
        pool.terminate()
