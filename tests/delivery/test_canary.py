"""The canary: a row of Rowcast's own that is timed on its way from a write to a frame."""

import asyncio
import json

from daemon.core.change import Change, Kind, Position, Seq
from daemon.core.errors import LogUnavailable
from daemon.core.hub import Hub
from daemon.delivery import canary as module
from daemon.delivery.canary import CANARY, TOPIC, Canary
from daemon.delivery.pack_router import PackRouter
from daemon.gateway.server import encode
from daemon.metrics import REGISTRY


class Clock:
    """A clock that stands until a test moves it."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def observed() -> tuple[float, float]:
    """How many rows have arrived so far, and the sum of their times."""
    count = REGISTRY.get_sample_value("rowcast_canary_seconds_count")
    return count or 0.0, REGISTRY.get_sample_value("rowcast_canary_seconds_sum") or 0.0


class Path:
    """A hub, and a canary that writes to it every millisecond. What it wrote arrives when the test says so."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.router = PackRouter({CANARY.name: CANARY})
        self.hub = Hub(encode, lambda change: change)
        self.written: asyncio.Queue[str] = asyncio.Queue()
        self.failure = ""
        self.canary = Canary(self.hub, self.write, 0.001, self.clock)

    async def write(self, mark: str) -> None:
        if self.failure:
            raise LogUnavailable(self.failure)
        await self.written.put(mark)

    def publish(self, kind: Kind, record: str | None) -> None:
        seq = Seq(self.hub.position.seq + 1)
        key = "{}" if kind is Kind.LIMIT else '{"id":1}'
        change = Change(seq, "1", "", "rowcast", "canary", TOPIC, kind, key, record)
        sendable, invalid = self.router.validate([change])
        assert [] == invalid
        self.hub.publish(sendable, Position("e", seq), lambda _: [TOPIC])

    def arrive(self, mark: str) -> None:
        self.publish(Kind.UPDATE, json.dumps({"id": 1, "mark": mark}))


async def test_a_row_is_timed_from_before_its_write_to_its_frame() -> None:
    path = Path()
    count, total = observed()
    writing = asyncio.create_task(path.canary.run())
    mark = await path.written.get()
    path.clock.now = 2.0
    path.arrive("of another daemon")
    assert (count, total) == observed()
    path.arrive(mark)
    assert (count + 1, total + 2.0) == observed()
    writing.cancel()


async def test_a_row_that_does_not_arrive_makes_the_daemon_unready_until_it_does() -> None:
    path = Path()
    writing = asyncio.create_task(path.canary.run())
    mark = await path.written.get()
    writing.cancel()
    assert [] == path.canary.problems()
    path.clock.now = module.MAX_AGE + 1
    assert ["a row takes more than 9 s from its write to its frame"] == path.canary.problems()
    path.arrive(mark)
    assert [] == path.canary.problems()


async def test_no_row_is_expected_any_more_after_a_reset_or_a_discontinuity() -> None:
    for is_reset in (True, False):
        path = Path()
        writing = asyncio.create_task(path.canary.run())
        await path.written.get()
        writing.cancel()
        if is_reset:
            path.publish(Kind.LIMIT, None)
        else:
            path.hub.move(path.hub.position, "crash")
        path.clock.now = 60.0
        assert [] == path.canary.problems()


async def test_no_further_row_is_written_while_many_have_not_arrived() -> None:
    path = Path()
    writing = asyncio.create_task(path.canary.run())
    marks = [await path.written.get() for _ in range(module.MAX_WAITING)]
    assert path.written.empty()
    path.arrive(marks[0])
    await path.written.get()
    writing.cancel()


async def test_a_row_that_cannot_be_written_makes_the_daemon_unready_with_the_reason() -> None:
    path = Path()
    path.failure = "ReadOnlySQLTransactionError 25006"
    writing = asyncio.create_task(path.canary.run())
    while not path.canary._writing.failure:
        await asyncio.sleep(0)
    path.clock.now = module.MAX_AGE + 1
    assert [f"the canary row cannot be written ({path.failure})"] == path.canary.problems()
    path.failure = ""
    await path.written.get()
    writing.cancel()
    assert [] == path.canary.problems()


def test_clients_cannot_follow_the_topic_of_the_canary() -> None:
    assert None is PackRouter({CANARY.name: CANARY}).schema_of(TOPIC)
