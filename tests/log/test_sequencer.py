"""The sequencer: events, log, batches and terms, on a real Postgres with concurrent writers."""

import asyncio
import json
import logging
import random
import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import pytest

from daemon.core.change import CONTENT, Change, Position, Seq, Topic
from daemon.core.errors import LogUnavailable
from daemon.log.queries import query
from daemon.log.reader import PgLogReader
from daemon.log.sequencer import FOLLOWER_LOCK, Sequencer
from daemon.postgres.connect import SESSION, Connection, Pool, connect, open_pool
from tests.support.log import ROWS, ManualLeader, leader, until_numbered
from tests.support.postgres import Server


async def everything(pool: Pool, after: int = 0) -> list[Change]:
    log, found = PgLogReader(pool), list[Change]()
    while changes := await log.read(found[-1].seq if found else Seq(after), 100):
        found += changes
    return found


async def test_with_twelve_writers_nothing_is_lost_or_repeated_and_each_row_stays_in_order(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    seed = random.randrange(2**32)
    logging.getLogger("test").info("seed %d", seed)  # shown when the test fails
    committed: set[tuple[int, int]] = set()

    async def writer(number: int) -> None:
        chance = random.Random(seed + number)
        connection = await connect(database, application_name=f"writer {number}")
        try:
            for _ in range(25):
                await _transaction(connection, chance, committed)
        finally:
            await connection.close()

    async with leader(database, pool):
        await asyncio.gather(*(writer(number) for number in range(12)))
        await until_numbered(pool)
    changes = await everything(pool)

    versions = defaultdict(list)
    for change in changes:
        record = json.loads(change.record or "{}")
        versions[record["id"]].append(record["version"])
    sent = [(row, version) for row, history in versions.items() for version in history]
    assert committed == set(sent)
    assert len(committed) == len(sent)
    assert {row: sorted(history) for row, history in versions.items()} == versions
    assert list(range(1, len(changes) + 1)) == [change.seq for change in changes]
    assert_transactions_are_whole(changes)


async def _transaction(connection: Connection, chance: random.Random, committed: set[tuple[int, int]]) -> None:
    """A few increments of random rows; some are rolled back, whole or to a savepoint."""
    written: list[tuple[int, int]] = []
    rows = sorted(chance.sample(range(1, 9), chance.randint(1, 3)))  # in one order: no deadlocks
    transaction = connection.transaction()
    await transaction.start()
    if chance.random() < 0.5:
        await connection.execute("select pg_current_xact_id()")  # an early transaction id, a late row lock
    await connection.execute("select pg_sleep($1)", chance.uniform(0, 0.02))
    for row in rows:
        savepoint = connection.transaction()
        await savepoint.start()
        version = await connection.fetchval(
            "update app.rows set version = version + 1 where id = $1 returning version", row
        )
        await connection.execute("select pg_sleep($1)", chance.uniform(0, 0.01))
        if chance.random() < 0.1:
            await savepoint.rollback()
        else:
            await savepoint.commit()
            written.append((row, version))
    if chance.random() < 0.1:
        await transaction.rollback()
    else:
        await transaction.commit()
        committed.update(written)


def assert_transactions_are_whole(changes: list[Change]) -> None:
    """The changes of a transaction are adjacent, and so are those of each topic within it."""
    blocks = [(change.tx, change.topic) for change in changes]
    runs = [block for place, block in enumerate(blocks) if place == 0 or blocks[place - 1] != block]
    assert len(set(runs)) == len(runs)
    transactions = [tx for place, (tx, _) in enumerate(runs) if place == 0 or runs[place - 1][0] != tx]
    assert len(set(transactions)) == len(transactions)


async def test_a_transaction_that_commits_late_is_numbered_when_it_commits(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    late = await connect(database, application_name="late")
    transaction = late.transaction()
    await transaction.start()
    await late.execute("update app.rows set version = 1 where id = 1")
    async with leader(database, pool):
        await sql.execute("update app.rows set version = 1 where id = 2")
        await _until_logged(pool, 1)
        await transaction.commit()
        await _until_logged(pool, 2)
    await late.close()
    assert ["row:2", "row:1"] == [change.topic for change in await everything(pool)]


async def _until_logged(pool: Pool, count: int) -> None:
    while await pool.fetchval("select count(*) from rowcast.log") < count:
        await asyncio.sleep(0)


async def test_a_transaction_id_taken_early_does_not_swap_two_versions_of_a_row(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    early = await connect(database, application_name="early")
    transaction = early.transaction()
    await transaction.start()
    await early.execute("select pg_current_xact_id()")
    await sql.execute("update app.rows set version = 1 where id = 1")
    await early.execute("update app.rows set version = 2 where id = 1")
    await transaction.commit()
    await early.close()
    async with leader(database, pool):
        await until_numbered(pool)
    assert [1, 2] == [json.loads(change.record or "")["version"] for change in await everything(pool)]


async def test_there_is_one_leader_and_the_next_continues_where_it_stopped(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    async with leader(database, pool) as first:
        await sql.execute("update app.rows set version = 1")
        await until_numbered(pool)
        connecting = partial(connect, database, application_name="second")
        second = Sequencer(connecting, pool, asyncio.Event(), asyncio.Event(), poll_every=0.01)
        task = asyncio.create_task(second.run())
        await second.settled.wait()
        assert not second.leading.is_set()
        await sql.execute("select pg_terminate_backend($1)", first.backend_pid)
        await sql.execute("update app.rows set version = 2")
        await until_numbered(pool)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    changes = await everything(pool)
    assert [1] * 8 + [2] * 8 == [json.loads(change.record or "")["version"] for change in changes]


class Offers:
    """The batches that a leader offers, each with the position before it."""

    def __init__(self) -> None:
        self.batches: list[tuple[Seq, Sequence[Change]]] = []
        self.received = asyncio.Event()

    def record(self, after: Seq, changes: Sequence[Change]) -> None:
        self.batches.append((after, changes))
        self.received.set()


async def test_the_offered_changes_equal_those_in_the_log(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute(ROWS)
    offers = Offers()
    async with sql.transaction():
        await sql.execute("set local rowcast.actor = 'ada'")
        await sql.execute("update app.rows set version = 1 where id < 4")
        await sql.execute("delete from app.rows where id = 2")
        await sql.execute("insert into app.rows values (2, 7)")
    await sql.execute("truncate app.rows")
    async with leader(database, pool, offer=offers.record, max_offered=100):
        await until_numbered(pool)
    [(after, changes)] = offers.batches
    assert await everything(pool) == changes
    assert changes[0].seq - 1 == after
    assert [1, 7] == [
        change.record and json.loads(change.record)["version"]
        for change in changes
        if change.topic == "row:2" and change.kind in CONTENT
    ]


MEMBERS = """
create table app.members (id integer primary key, room text, user_id text);
select rowcast.watch('app.members', $$'room:' || r.room$$, '{id,room,user_id}',
                     revokes => $$jsonb_build_object('user', r.user_id, 'topic', 'room:' || r.room)$$);
insert into app.members values (1, 'a', 'ada');
"""
BATCHES = {  # and whether they are ordinary
    "update app.rows set version = version + 1": True,
    "update app.rows set version = 8 where id = 1; commit; update app.rows set version = 9 where id < 3": True,
    "insert into app.rows select n, 0 from generate_series(101, 1200) as n": False,
    "delete from app.rows where id = 1": False,
    "insert into app.members values (2, 'b', 'ada')": False,
    "update app.members set room = 'c' where id = 2": False,
    "truncate app.members": True,
}


async def test_a_batch_is_numbered_by_the_short_statement_only_if_it_is_ordinary(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    await sql.execute(MEMBERS)
    connection = await connect(database, application_name="test", server_settings=SESSION)
    try:
        numbering = ManualLeader(connection, few=True)
        assert await numbering.lead()
        assert await numbering.number()
        found = {}
        for batch in BATCHES:
            await sql.execute(batch)
            assert await numbering.number()
            found[batch] = numbering.was_ordinary
            assert numbering.base == (await everything(pool))[-1].seq
    finally:
        await connection.close()
    assert BATCHES == found


async def test_offered_changes_are_those_of_the_log_whichever_statement_numbers_them(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    await sql.execute(MEMBERS)
    offers, numbers = Offers(), asyncio.Event()
    async with leader(database, pool, numbers=numbers, offer=offers.record, max_offered=50):
        await until_numbered(pool)
        before = (await everything(pool))[-1].seq
        for batch in BATCHES:
            offers.batches.clear()
            await sql.execute(batch)
            await until_numbered(pool)
            logged = await everything(pool, before)
            if len(logged) > 50:
                await numbers.wait()
            else:
                while not offers.batches or offers.batches[-1][1][-1].seq < logged[-1].seq:
                    offers.received.clear()
                    await offers.received.wait()
                assert logged == [
                    change for _, changes in offers.batches for change in changes if change.seq > before
                ]
            before = logged[-1].seq


@pytest.mark.parametrize("part", ["grouped", "numbered", "logged"])
def test_both_statements_that_number_give_order_in_the_same_words(part: str) -> None:
    texts = {
        re.search(rf"\b{part} as (?:materialized )?\((.*?)\n\)", query(name), re.DOTALL)[1]  # type: ignore[index]
        for name in ("number_events", "number_few")
    }
    assert 1 == len(texts)


async def test_a_batch_with_too_many_changes_to_offer_sets_numbers_instead(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    offers, numbers = Offers(), asyncio.Event()
    async with leader(database, pool, numbers=numbers, offer=offers.record, max_offered=7):
        await sql.execute("update app.rows set version = 1")
        await numbers.wait()
        await sql.execute("update app.rows set version = 2 where id < 8")
        await offers.received.wait()
    assert [(8, 7)] == [(after, len(changes)) for after, changes in offers.batches]
    assert 15 == len(await everything(pool))


async def test_the_leader_notifies_only_while_another_daemon_follows(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    notified_by: asyncio.Queue[int] = asyncio.Queue()
    numbers, offers = asyncio.Event(), Offers()
    await sql.add_listener("rowcast_log", lambda _, pid, *__: notified_by.put_nowait(pid))
    async with leader(database, pool, offer=offers.record, max_offered=100) as first:
        for version in range(1, 6):
            offers.received.clear()
            await sql.execute("update app.rows set version = $1", version)
            await offers.received.wait()
        await sql.execute("notify rowcast_log")  # arrives after any notification of the updates above
        assert sql.get_server_pid() == await notified_by.get()
        connecting = partial(connect, database, application_name="second", server_settings=SESSION)
        second = Sequencer(connecting, pool, asyncio.Event(), numbers, poll_every=0.01)
        following = asyncio.create_task(second.run())
        await second.settled.wait()
        assert numbers.is_set()
        await sql.execute("update app.rows set version = 7")
        assert first.is_own_notification(await notified_by.get())
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)


@pytest.mark.parametrize("few", [False, True])
async def test_a_poll_that_finds_nothing_keeps_no_daemon_from_following(
    database: str, pool: Pool, sql: Connection, few: bool
) -> None:
    await sql.execute(ROWS)
    connection = await connect(database, application_name="test", server_settings=SESSION)
    try:
        numbering = ManualLeader(connection, few=few)
        assert await numbering.lead()
        assert await numbering.number()
        async with connection.transaction():
            assert await numbering.number()
            assert await sql.fetchval(query("share_follower_lock"), FOLLOWER_LOCK)
    finally:
        await connection.close()


async def test_each_new_leader_opens_a_term_numbered_far_above_earlier_terms(
    database: str, pool: Pool, sql: Connection
) -> None:
    await sql.execute(ROWS)
    for version in (1, 2):
        async with leader(database, pool):
            await sql.execute("update app.rows set version = $1 where id = 1", version)
            await until_numbered(pool)
    first, second = await everything(pool)
    assert 1 == first.seq
    assert second.seq > first.seq + 2**17
    terms = await pool.fetch("select term, base from rowcast.terms order by term")
    assert [(1, 0), (2, second.seq - 1)] == [tuple(row) for row in terms]


@pytest.mark.parametrize(("killed", "reason"), [(True, "crash"), (False, "epoch")])
async def test_a_position_is_continued_or_refused_with_the_right_reason(
    database: str, pool: Pool, sql: Connection, killed: bool, reason: str
) -> None:
    await sql.execute(ROWS)
    log = PgLogReader(pool)
    for version in (1, 2):
        async with leader(database, pool, killed=killed):
            await sql.execute("update app.rows set version = $1", version)
            await until_numbered(pool)
    head = await log.head()

    async def at(seq: int) -> str | None:
        return await log.continuity(Position(head.epoch, Seq(seq)))

    base = await pool.fetchval("select max(base) from rowcast.terms")
    assert [None] * 6 == [await at(seq) for seq in (0, 1, 8, base, base + 1, head.seq)]
    assert [reason] * 2 == [await at(seq) for seq in (9, base - 1)]
    for seq in (head.seq + 1, 2**53 - 1):
        with pytest.raises(LogUnavailable, match="no leader"):  # the next one decides
            await at(seq)
    async with leader(database, pool):
        base = await pool.fetchval("select max(base) from rowcast.terms")
        assert ["epoch"] * 2 == [await at(seq) for seq in (base + 1, 2**53 - 1)]  # that has never been a number
    assert "epoch" == await log.continuity(Position("other", head.seq))


async def test_a_restore_into_another_database_empties_the_log(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute(ROWS)
    async with leader(database, pool):
        await sql.execute("update app.rows set version = 1")
        await until_numbered(pool)
    log = PgLogReader(pool)
    before = await log.head()
    # As after restoring a dump from elsewhere: its transaction ids are ahead of this server's.
    await sql.execute(
        "update rowcast.terms set database_oid = 1; update rowcast.batches set snapshot = '900000000:900000000:'"
    )
    async with leader(database, pool):
        assert [] == await everything(pool)
        await sql.execute("update app.rows set version = 2 where id = 1")
        await until_numbered(pool)
    after = await log.head()
    assert before.epoch != after.epoch
    assert after.seq > before.seq
    assert ["row:1"] == [change.topic for change in await everything(pool)]


async def test_reads_end_at_the_end_of_a_transaction(database: str, pool: Pool, sql: Connection) -> None:
    await sql.execute(ROWS)
    async with leader(database, pool):
        for _ in range(3):
            await sql.execute("update app.rows set version = version + 1")
        await until_numbered(pool)
    log = PgLogReader(pool)
    assert [8, 16, 24] == [(await log.read(Seq(after), 3))[-1].seq for after in (0, 8, 16)]
    assert 16 == len(await log.read(Seq(0), 9))
    rows = [Topic(f"row:{number}") for number in (1, 2)]
    assert [1, 2] == [change.seq for change in await log.read_topics(rows, Seq(0), Seq(24), 1)]
    assert [1, 2, 9, 10] == [change.seq for change in await log.read_topics(rows, Seq(0), Seq(16), 100)]


async def test_databases_of_one_cluster_have_different_epochs(database: str, pool: Pool, postgres: Server) -> None:
    async with leader(database, pool):
        here = (await PgLogReader(pool).head()).epoch
    async with postgres.database(template="chatgenius") as other:
        pool_there = await open_pool(other, application_name="test")
        async with leader(other, pool_there):
            there = (await PgLogReader(pool_there).head()).epoch
        await pool_there.close()
    assert here != there


async def test_old_snapshots_are_deleted_and_the_newest_is_kept(
    database: str, pool: Pool, sql: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.log.sequencer.KEPT_BATCHES", 3)
    await sql.execute(ROWS)
    async with leader(database, pool):
        for version in range(12):
            await sql.execute("update app.rows set version = $1 where id = 1", version + 1)
            await until_numbered(pool)
        await _until_logged(pool, 12)
    assert await pool.fetchval("select count(*) from rowcast.batches") < 6
    assert 12 == await pool.fetchval("select max(last_seq) from rowcast.batches")
