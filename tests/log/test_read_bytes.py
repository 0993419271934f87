"""Reads are limited in bytes of records: they end early, miss nothing, and never hold much more than the limit."""

import random

import pytest

from daemon.core.change import Change, Kind, Seq, Topic
from daemon.core.ports import MAX_READ_BYTES
from daemon.log.reader import PgLogReader
from daemon.postgres.connect import Connection, Pool
from tests.support.log import leader, until_numbered

MIB = 2**20
TABLE = """
create schema app;
create table app.notes (id integer primary key, room integer not null, note text not null);
select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id,room,note}');
"""
ROOMS = [Topic("room:1"), Topic("room:2")]


def size_of(change: Change) -> int:
    return len((change.record or "").encode())


@pytest.mark.parametrize("seed", range(4))
async def test_reads_end_once_they_have_enough_bytes_and_miss_nothing(
    database: str, pool: Pool, sql: Connection, seed: int
) -> None:
    chance = random.Random(seed)
    limit = chance.choice((1_000, 20_000, 100_000))
    await sql.execute(TABLE)
    async with leader(database, pool):
        for number in range(0, 60, 3):
            sizes = [chance.choice((1, 100, 9_000, 60_000)) for _ in range(chance.randint(1, 3))]
            await sql.executemany(
                "insert into app.notes values ($1, $2, repeat('\u00e9', $3))",
                [(number + place, chance.randint(1, 2), size) for place, size in enumerate(sizes)],
            )
        await sql.execute("delete from app.notes where id % 7 = 0")  # their content counts no longer
        await until_numbered(pool)
    log, whole = PgLogReader(pool, max_bytes=limit), await PgLogReader(pool, max_bytes=2**40).read(Seq(0), 10_000)
    assert not whole.more
    end_of = {change.tx: change.seq for change in whole}
    found: list[Change] = []
    more = True
    while more:
        batch = await log.read(found[-1].seq if found else Seq(0), chance.choice((1, 5, 1000)))
        assert not batch or end_of[batch[-1].tx] == batch[-1].seq
        without_last = [change for change in batch if change.tx != batch[-1].tx]
        assert sum(map(size_of, without_last)) < limit
        found += batch
        more = batch.more
    assert whole == found
    for topics in (ROOMS, ROOMS[:1]):
        replayed: list[Change] = []
        more = True
        while more:
            batch = await log.read_topics(
                topics, replayed[-1].seq if replayed else Seq(0), whole[-1].seq, chance.choice((1, 5, 1000))
            )
            replayed += batch
            more = batch.more
        assert [change for change in whole if change.topic in topics] == replayed


async def test_a_transaction_with_too_many_bytes_is_read_as_limit_live_and_in_a_replay(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(TABLE)
    async with leader(database, pool):
        await sql.execute("insert into app.notes values (1, 1, 'small')")
        await sql.execute(
            f"insert into app.notes select n, 1 + n % 2, repeat('x', {MIB}) from generate_series(2, 5) n"
        )
        await sql.execute(
            "insert into app.notes select n, 1, repeat('x', 8000) from generate_series(10, 600) as n"
        )  # no large record, but 4 MiB
        await sql.execute("insert into app.notes values (6, 2, 'small')")
        await until_numbered(pool)
    log = PgLogReader(pool, transaction_bytes=3 * MIB)
    kinds: list[tuple[Seq, Topic, Kind]] = []
    more = True
    while more:
        batch = await log.read(Seq(kinds[-1][0] if kinds else 0), 1000)
        kinds += [(change.seq, change.topic, change.kind) for change in batch]
        more = batch.more
    first, last = Seq(1), Seq(597)
    limits = [(3, ROOMS[0], Kind.LIMIT), (5, ROOMS[1], Kind.LIMIT), (596, ROOMS[0], Kind.LIMIT)]
    assert [(first, ROOMS[0], Kind.INSERT), *limits, (last, ROOMS[1], Kind.INSERT)] == kinds
    for topic in ROOMS:
        replayed, more = list[Change](), True
        while more:
            batch = await log.read_topics([topic], replayed[-1].seq if replayed else Seq(0), last, 1000)
            replayed += batch
            more = batch.more
        assert [entry for entry in kinds if entry[1] == topic] == [
            (change.seq, change.topic, change.kind) for change in replayed
        ]
    changes = await PgLogReader(pool, transaction_bytes=8 * MIB).read_topics(ROOMS, Seq(0), Seq(5), 1000)
    assert {Kind.INSERT} == {change.kind for change in changes}


async def test_a_batch_with_many_bytes_is_not_offered_but_read(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute(TABLE)
    offered: list[int] = []
    async with leader(
        database, pool, offer=lambda _, changes: offered.extend(change.seq for change in changes), max_offered=100
    ):
        for size in (10, MAX_READ_BYTES + 1, 10):
            await sql.execute(
                "insert into app.notes select coalesce(max(id), 0) + 1, 1, repeat('x', $1) from app.notes", size
            )
            await until_numbered(pool)
    assert [1, 3] == offered
