"""A large record costs those who do not follow its topic nothing: Postgres outlines it, and it may stay there."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from daemon.core.change import Change, Kind, Outline, Seq, Topic
from daemon.core.column_types import Column
from daemon.core.filters import Asked, Tables, view
from daemon.core.hub import Hub
from daemon.core.json_text import members
from daemon.core.own_tables import OwnColumn, OwnTable
from daemon.core.ports import LARGE_RECORD, MAX_READ_BYTES
from daemon.delivery.live import Live
from daemon.delivery.log_cache import LogCache
from daemon.delivery.own_tables import row_model
from daemon.delivery.pack_router import PackRouter
from daemon.delivery.pump import Pump
from daemon.log.reader import PgLogReader
from daemon.packs import JsonObject, Pack, Row
from daemon.postgres.connect import Connection, Pool
from tests.support.followers import Follower
from tests.support.log import leader, until_numbered

TABLE = """
create schema app;
create table app.notes (
    id integer primary key, room text not null, note text, body jsonb, bare json, tags text [], amounts numeric [],
    price numeric
);
select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id,room,note,body,bare,tags,amounts,price}');
"""
BUSY, QUIET = Topic("room:busy"), Topic("room:quiet")
SHAPES = {
    "id": "integer", "room": "text", "note": "text", "body": "jsonb", "bare": "json", "tags": "text[]",
    "amounts": "numeric[]", "price": "numeric",
}  # fmt: skip
MODEL = row_model(
    OwnTable("app", "notes", "app", ("room:*",), ("id",), tuple(OwnColumn(*each, True) for each in SHAPES.items()))
)
ROUTER = PackRouter({"app": Pack("app", {"notes": MODEL}, (r"room:\w+",))})
# Of each kind so much that its record is left in the log, and parsing it would take long.
KINDS = {
    "ascii": ("note", "repeat('x', 2000000)"),
    "not ascii": ("note", "repeat('\u00e9', 1000000)"),
    "escapes": ("note", "repeat('\"', 1000000)"),
    "many levels": ("body", "(repeat('[', 1500) || repeat(']', 1500))::jsonb || to_jsonb(repeat('x', 2000000))"),
    "many small arrays": ("body", "('[' || repeat('[[[[]]]],', 200000) || '1]')::jsonb"),
    "many small members": ("body", "(select jsonb_object_agg(n, n) from generate_series(1, 150000) as n)"),
    "null characters": ("bare", "('\"' || repeat('\\u0000', 200000) || repeat('NaN', 200000) || '\"')::json"),
    "an array": ("tags", "array_fill(null::text, '{300000}')"),
    "long numbers": ("amounts", "array_fill(repeat('1', 130000)::numeric, '{12}')"),
}


async def insert(sql: Connection, number: int, room: Topic, column: str, value: str) -> None:
    await sql.execute(
        f"insert into app.notes (id, room, {column}) values ($1, $2, {value})", number, room.removeprefix("room:")
    )


async def logged(database: str, pool: Pool, sql: Connection, *values: tuple[str, str]) -> None:
    """The log of a row for each of these columns and values."""
    await sql.execute(TABLE)
    async with leader(database, pool):
        for number, value in enumerate(values):
            await insert(sql, number, QUIET, *value)
        await until_numbered(pool)


async def everything(pool: Pool) -> Sequence[Change]:
    return await PgLogReader(pool, max_bytes=2**40).read(Seq(0), 1000)


def nobody(_: Change) -> bool:
    return False


ESCAPED = {"note": "a\\\x7fu\x01\x7fb\\u0000 \x7fd", "bare": r"\u0000\ud800\\\ude00\\\\"}
"""Backslashes, control characters, what json_each refuses, and what stands for these in the statement."""


async def test_an_outline_copies_short_values_whatever_their_escapes(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(TABLE.replace(" note text", r' "no\te" text').replace(",note,", r',"no\\te",'))
    async with leader(database, pool):
        await sql.execute(
            r"""insert into app.notes (id, room, "no\te", bare, body) values (1, 'quiet', $1, $2, """
            + KINDS["many small members"][1]
            + ")",
            ESCAPED["note"],
            f'"{ESCAPED["bare"]}"',
        )
        await until_numbered(pool)
    [change] = await everything(pool)
    assert change.outline is not None
    assert ("body",) == change.outline.emptied
    texts = members(change.record or "")
    assert {**texts, "body": "{}"} == members(change.outline.text)
    assert ESCAPED["note"] == json.loads(texts[r"no\te"])
    assert f'"{ESCAPED["bare"]}"' == texts["bare"]


async def test_what_is_validated_of_a_large_record_is_short_whatever_it_holds(
    database: str, pool: Pool, sql: Connection
) -> None:
    await logged(database, pool, sql, *KINDS.values())
    whole = await everything(pool)
    left = [await PgLogReader(pool, wants=nobody).read(Seq(seq), 1) for seq in range(len(KINDS))]
    for (column, _), change, [without] in zip(KINDS.values(), whole, left, strict=True):
        assert change.outline is not None
        assert change.outline == without.outline
        assert without.is_left
        assert (column,) == change.outline.emptied
        assert len(change.outline.text) < 200
        assert len((change.record or "").encode()) > MAX_READ_BYTES
        assert not ROUTER.needs_record(without)
        for each in (change, without):
            assert ([each], []) == ROUTER.validate([each])
    # The same records without their outlines are what the outlines say.
    assert [] == ROUTER.validate([change._replace(outline=None) for change in whole])[1]


async def test_a_large_record_is_the_same_as_if_it_were_small(database: str, pool: Pool, sql: Connection) -> None:
    await logged(database, pool, sql, *KINDS.values())
    read = await everything(pool)
    stored = await pool.fetch("select c.content from rowcast.changes as c order by c.seq")
    assert [record for (record,) in stored] == [change.record for change in read]


async def test_a_record_of_medium_size_is_outlined_and_never_left(database: str, pool: Pool, sql: Connection) -> None:
    await logged(
        database, pool, sql, ("note", f"repeat('x', {LARGE_RECORD - 1000})"), ("note", f"repeat('x', {LARGE_RECORD})")
    )
    small, medium = await PgLogReader(pool, wants=nobody).read(Seq(0), 10)
    assert small.outline is None
    assert small.record is not None
    assert medium.outline is not None
    assert medium.record is not None


class Narrow(Row):
    """What refuses each of KINDS: a text where there is JSON, an object where there is an array."""

    id: int
    room: str
    note: None
    body: JsonObject | None
    bare: int | None
    tags: list[str] | None
    amounts: list[int] | None
    price: str | None


async def test_a_large_record_is_refused_for_the_same_reason_as_a_whole_one(
    database: str, pool: Pool, sql: Connection
) -> None:
    await logged(database, pool, sql, *KINDS.values())
    router = PackRouter({"app": Pack("app", {"notes": Narrow}, (r"room:\w+",))})
    changes = await everything(pool)
    [wanted] = await PgLogReader(pool, wants=router.needs_record).read(Seq(0), 1)
    reasons = [reason for _, _, reason in router.validate([change._replace(outline=None) for change in changes])[1]]
    assert "record: string_type tags" in reasons
    assert len(KINDS) - 1 == len(reasons)  # an object is one
    assert reasons == [reason for _, _, reason in router.validate(changes)[1]]
    assert wanted.is_left


class Pumped:
    """A pump that reads what its live end wants. `gate` holds back what it has read."""

    def __init__(self, pool: Pool) -> None:
        self.hub = Hub(lambda payload: payload, ROUTER.with_exact_numbers)
        self.log = PgLogReader(pool)
        self.live = Live(self.hub, ROUTER, LogCache(self.log, 2**27))
        self.published: list[Change] = []
        self.live.on_publish = lambda changes, _: self.published.extend(changes)
        self.reading, self.gate = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.wakeup = asyncio.Event()
        self.pump = Pump(_Gated(pool, self), self.wakeup, self.live, self._store, poll_every=3600)

    async def _store(self, dead_letters: Sequence[tuple[Change, str, str]]) -> None:
        raise AssertionError([reason for _, _, reason in dead_letters])


class _Gated(PgLogReader):
    def __init__(self, pool: Pool, pumped: Pumped) -> None:
        super().__init__(pool, wants=pumped.live.wants)
        self._pumped = pumped

    async def _fetch(self, time_limit: float, name: str, *arguments: object) -> list[Any]:
        found = await super()._fetch(time_limit, name, *arguments)
        if name == "outlines":
            self._pumped.reading.set()
            await self._pumped.gate.wait()
        return found


@asynccontextmanager
async def pumping(database: str, pool: Pool, sql: Connection) -> AsyncIterator[Pumped]:
    await sql.execute(TABLE)
    pumped = Pumped(pool)
    async with leader(database, pool, numbers=pumped.wakeup, offer=pumped.pump.offer):
        task = asyncio.create_task(pumped.pump.run())
        await pumped.pump.started.wait()
        try:
            yield pumped
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def test_a_large_record_comes_here_only_if_somebody_follows_its_topic(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool, sql) as pumped:
        follower = Follower()
        pumped.hub.follow(BUSY, follower)
        await insert(sql, 1, QUIET, *KINDS["ascii"])
        await insert(sql, 2, BUSY, *KINDS["ascii"])
        await insert(sql, 3, BUSY, "note", "'small'")
        await pumped.live.wait_until_delivered(Seq(3))
        assert [None, 2_000_000, 100] == [
            change.record and len(change.record) // 100 * 100 for change in pumped.published
        ]
        assert ["room:busy", "room:busy"] == [json.loads(frame)["topic"] for frame in follower.frames]
        assert 2_000_000 == len(json.loads(follower.frames[0])["changes"][0]["record"]["note"])


async def test_who_follows_while_a_large_record_is_left_still_gets_it(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool, sql) as pumped:
        follower = Follower()
        pumped.gate.clear()
        await insert(sql, 1, QUIET, *KINDS["ascii"])
        await pumped.reading.wait()
        pumped.hub.follow(QUIET, follower)
        pumped.gate.set()
        await pumped.live.wait_until_delivered(Seq(1))
        assert [2_000_000] == [len(json.loads(frame)["changes"][0]["record"]["note"]) for frame in follower.frames]


async def test_a_replay_reads_what_was_left_and_others_are_served_from_memory(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with pumping(database, pool, sql) as pumped:
        await insert(sql, 1, BUSY, "note", "'small'")
        await insert(sql, 2, QUIET, *KINDS["ascii"])
        await pumped.live.wait_until_delivered(Seq(2))
        cache = pumped.live.log_cache
        [large] = await cache.read_topics([QUIET], Seq(0), Seq(2), 10)
        assert 2_000_000 < len(large.record or "")
        monkeypatch.setattr(pumped.log, "read_topics", None)
        assert [1] == [change.seq for change in await cache.read_topics([BUSY], Seq(0), Seq(2), 10)]
        assert [] == await cache.read_topics([QUIET], Seq(0), Seq(1), 10)
        assert [] == await cache.read_topics([QUIET], Seq(2), Seq(2), 10)


async def test_the_offers_of_the_sequencer_hold_no_large_record(database: str, pool: Pool, sql: Connection) -> None:
    offered: list[Change] = []
    await sql.execute(TABLE)
    async with leader(database, pool, offer=lambda _, changes: offered.extend(changes)):
        for number, size in enumerate((100, LARGE_RECORD, 100)):
            await insert(sql, number, BUSY, "note", f"repeat('x', {size})")
            await until_numbered(pool)
    assert [1, 3] == [change.seq for change in offered]


async def test_a_row_that_was_written_again_after_its_deletion_is_not_gone_if_its_record_is_left(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with pumping(database, pool, sql) as pumped:
        await insert(sql, 1, QUIET, "note", "'small'")
        await pumped.live.wait_until_delivered(Seq(1))
        async with sql.transaction():
            await sql.execute("delete from app.notes")
            await insert(sql, 1, QUIET, *KINDS["ascii"])
        await pumped.live.wait_until_delivered(Seq(3))
        found = await pumped.live.log_cache.read_topics([QUIET], Seq(1), Seq(3), 10)
        assert [Kind.DELETE, Kind.INSERT] == [change.kind for change in found]
        assert 2_000_000 < len(found[1].record or "")


COLUMNS: Tables = {
    "notes": {"id": Column("id", "integer"), "note": Column("note", "text"), "body": Column("body", "json")}
}


@pytest.mark.parametrize(
    ("where", "is_seen"),
    [
        ({"id": {"eq": 0}}, True),
        ({"id": {"gt": 0}}, False),
        ({"note": {"is_null": False}}, True),
        ({"note": {"starts_with": "xxx"}}, True),
        ({"note": {"eq": ""}}, False),
        ({"body": {"is_null": True}}, True),
    ],
)
async def test_a_filter_sees_the_same_in_an_outline_as_in_the_record(where: object, is_seen: bool) -> None:
    short = '{"id":0,"note":"","body":null}'
    record = short.replace('""', f'"{"x" * 100_000}"')
    change = Change(
        Seq(1), "1", "", "app", "notes", QUIET, Kind.INSERT, '{"id":0}', record, outline=Outline(short, ("note",))
    )
    seen = view(Asked({"notes": where}, None), COLUMNS)
    assert ([change] if is_seen else []) == seen.of_run([change], {})
    for columns, shown in (
        (["note"], record.removeprefix('{"id":0,').removesuffix(',"body":null}')),
        (["id"], '"id":0'),
    ):
        narrow = view(Asked(None, {"notes": columns}), COLUMNS)
        assert [f"{{{shown.strip('{}')}}}"] == [each.record for each in narrow.of_run([change], {})]
