"""Tables without a pack: what the router is told of them, and that it is told in time."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from daemon.core.change import Change, Kind, Numbers, Right, Seq, Topic
from daemon.core.hub import Hub
from daemon.core.own_tables import OwnColumn, OwnTable
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.own_tables import OwnTables, overlapping, pack_of
from daemon.delivery.pack_router import OWN_TABLES, PackRouter
from daemon.delivery.pump import Pump
from daemon.log.own_tables import PgOwnTableReader
from daemon.log.reader import PgLogReader
from daemon.packs import Pack, Row, bundled
from daemon.postgres.connect import Connection, Pool
from tests.support.log import leader

ORDERS = OwnTable(
    "public",
    "orders",
    "public.orders",
    ("orders:*", "sales"),
    ("id",),
    (OwnColumn("id", "bigint", False), OwnColumn("total", "numeric", True)),
)
SERVE = "select rowcast.serve($1::text::regclass, $$'row:' || r.id$$, 'true')"


class Follower:
    """A follower that keeps the frames that it receives."""

    user = "ada"
    numbers = Numbers.JSON
    outlet = None

    def __init__(self) -> None:
        self.frames = b""
        self.lost: list[Topic] = []

    def deliver(self, frames: bytes) -> None:
        self.frames += frames

    def signal(self, frame: bytes) -> None:
        """Does not happen here."""

    def revoked(self, topic: Topic) -> None:
        self.lost.append(topic)

    def discontinued(self) -> None:
        raise AssertionError


class Reader:
    """Tables that a test sets."""

    def __init__(self, *tables: OwnTable) -> None:
        self.tables = tables

    async def read(self) -> Sequence[OwnTable]:
        return self.tables


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_true():
            await asyncio.sleep(0.01)


def a_change(topic: str, record: str = '{"id":1,"total":1}', **members: object) -> Change:
    change = Change(Seq(1), "1", "", "public", "orders", Topic(topic), Kind.INSERT, '{"id":1}', record)
    return change._replace(**members)  # type: ignore[arg-type]


async def served(*tables: OwnTable, packs: dict[str, Pack] | None = None) -> tuple[PackRouter, OwnTables, Reader]:
    router, reader = PackRouter(packs or {}), Reader(*tables)
    own = OwnTables(reader, router)
    await own.refresh()
    return router, own, reader


async def test_only_the_topics_of_a_table_are_served() -> None:
    router, _, _ = await served(ORDERS)
    topics = {"orders:1": OWN_TABLES, "orders:a.b": OWN_TABLES, "sales": OWN_TABLES, "sales:1": None, "orders": None}
    assert topics == {topic: router.schema_of(Topic(topic)) for topic in topics}
    sendable, invalid = router.validate([a_change("orders:1"), a_change("other")])
    assert (["orders:1"], ["topic: not_served"]) == ([c.topic for c in sendable], [found.reason for found in invalid])


async def test_a_topic_that_a_pack_serves_too_is_the_packs() -> None:
    class Note(Row):
        id: int

    router, _, _ = await served(ORDERS, packs={"app": Pack("app", {"notes": Note}, (r"orders:\d+",))})
    assert "app" == router.schema_of(Topic("orders:1"))
    sendable, invalid = router.validate([a_change("orders:1"), a_change("orders:x")])
    assert (["orders:x"], ["topic: not_served"]) == ([c.topic for c in sendable], [found.reason for found in invalid])


async def test_a_change_that_does_not_fit_asks_for_another_look() -> None:
    router, own, reader = await served(ORDERS)
    wider = a_change("sales", '{"id":1,"total":1,"note":"n"}')
    assert router.is_outdated([wider], router.validate([wider])[1])
    reader.tables = (ORDERS._replace(columns=(*ORDERS.columns, OwnColumn("note", "text", True))),)
    contract = own.contract
    await own.refresh()
    assert [] == router.validate([wider])[1]
    assert contract != own.contract
    pack = router.own["public", "orders"]
    await own.refresh()
    assert pack is router.own["public", "orders"]


async def test_a_right_ends_also_in_topics_that_are_not_served_any_more() -> None:
    router, own, reader = await served(ORDERS)
    reader.tables = ()
    await own.refresh()
    [end] = router.right_ends(
        router.ended_rights([a_change("*public.orders", kind=Kind.LOST, ends=Right(None, None))])
    )
    assert end.serves(Topic("orders:1"))
    assert ([], []) == router.validate([a_change("*public.orders", kind=Kind.LOST)])


@pytest.mark.parametrize(
    ("topic", "found"),
    [("users", "users"), ("users*", "users"), ("u*", "user:"), ("channel:*", "channel:"), ("channel:x*", "channel:"),
     ("channel:x", None), ("users:*", None), ("orders:*", None)],
)  # fmt: skip
def test_topics_that_a_pack_may_have_are_found(topic: str, found: str | None) -> None:
    assert found == overlapping(bundled()["chatgenius"], [topic])


def test_a_column_may_have_any_name() -> None:
    names = ["model_config", "key", "_x", "a b", "ä", "class", "copy", "from"]
    pack = pack_of(ORDERS._replace(key=("key",), columns=tuple(OwnColumn(name, "bigint", False) for name in names)))
    record = "{" + ",".join(f'"{name}":1' for name in names) + "}"
    change = a_change("orders:1", record, key='{"key":1}')
    assert None is pack.problem(change)
    assert '{"key":"1"}' == pack.with_exact_numbers(change).key
    assert "record: int_type a b" == pack.problem(change._replace(record=record.replace('"a b":1', '"a b":"x"')))


@pytest.mark.usefixtures("rows")
async def test_what_is_written_right_behind_a_watch_is_delivered(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute("create table app.more (id integer primary key, extra text)")
    await sql.execute(SERVE, "app.rows")
    router, wakeup, follower = PackRouter(), asyncio.Event(), Follower()
    hub, log = Hub(lambda payload: payload + b"\n", router.with_exact_numbers), PgLogReader(pool)

    async def store(dead_letters: object) -> None:
        raise AssertionError(dead_letters)

    own = OwnTables(PgOwnTableReader(pool), router)
    pump = Pump(log, wakeup, Live(hub, router, LogCache(log, 0)), store, refresh=own.refresh, poll_every=3600)
    async with leader(database, pool, numbers=wakeup, offer=pump.offer, max_offered=100):
        task = asyncio.create_task(pump.run())
        await pump.started.wait()
        one = Topic("row:1")
        hub.follow(one, follower)
        async with sql.transaction():
            await sql.execute(SERVE, "app.more")
            await sql.execute("insert into app.more values (1, 'first')")
        await sql.execute("insert into app.more values (2); update app.more set extra = 'second'")
        await until(lambda: b"second" in follower.frames)
        await sql.execute("select rowcast.unwatch('app.more')")
        await until(lambda: bool(follower.lost))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    text = follower.frames.decode()
    assert text.index('"reset"') < text.index("first") < text.index("second") < text.index('"revoked"')
    assert [one] == follower.lost
