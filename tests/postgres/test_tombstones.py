"""Tombstones: the log keeps the changes of deleted rows, without their content."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from daemon.core.change import Change, Seq, Topic
from daemon.log.dead_letters import DeadLetters
from daemon.log.reader import PgLogReader
from daemon.log.retention import Retention
from daemon.log.sequencer import Sequencer
from daemon.postgres.connect import Connection, Pool, open_pool
from tests.support.log import leader, until_numbered

NOTES = """
create schema app;
create table app.notes (id integer primary key, room text not null, body text, deleted_at timestamptz);
select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id,room,body}', soft_delete => 'deleted_at');
"""


@pytest.fixture
async def pool(database: str, sql: Connection) -> AsyncIterator[Pool]:
    await sql.execute(NOTES)
    pool = await open_pool(database, application_name="test", max_size=5)
    yield pool
    await pool.close()


async def everything(pool: Pool) -> list[Change]:
    return list(await PgLogReader(pool).read(Seq(0), 1000))


def contents(changes: list[Change]) -> list[tuple[str, str, str | None]]:
    return [(c.topic, c.kind.value, json.loads(c.record)["body"] if c.record else None) for c in changes]


def retention(pool: Pool, sequencer: Sequencer) -> Retention:
    async def nowhere() -> Connection:
        raise AssertionError("nothing is dropped here")

    return Retention(pool, nowhere, sequencer, timedelta(days=7))


@pytest.mark.parametrize(
    "statement", ["update app.notes set deleted_at = now() where id = 1", "delete from app.notes where id = 1"]
)
async def test_a_deleted_row_loses_its_earlier_content_once_its_deletion_is_numbered(
    database: str, pool: Pool, sql: Connection, statement: str
) -> None:
    async with leader(database, pool):
        await sql.execute("insert into app.notes values (1, 'a', 'secret'), (2, 'a', 'open')")
        await sql.execute("update app.notes set body = body || '!'")
        await until_numbered(pool)
        await sql.execute(statement)
        await until_numbered(pool)
        assert [
            ("room:a", "insert", None),
            ("room:a", "insert", "open"),
            ("room:a", "update", None),
            ("room:a", "update", "open!"),
            ("room:a", "delete", None),
        ] == contents(await everything(pool))
        assert 1 == await pool.fetchval("select count(*) from rowcast.tombstones")


async def test_a_row_that_is_deleted_and_inserted_again_keeps_its_new_content(
    database: str, pool: Pool, sql: Connection
) -> None:
    """The deletion from the topic 'b' is numbered behind the new content in the topic 'a'."""
    await sql.execute("""
        create table app.shared (id integer primary key, rooms text[], body text);
        select rowcast.watch('app.shared', 'r.rooms', '{id,rooms,body}');
    """)
    async with leader(database, pool):
        await sql.execute("insert into app.shared values (1, '{a,b}', 'old')")
        async with sql.transaction():
            await sql.execute("delete from app.shared")
            await sql.execute("insert into app.shared values (1, '{a}', 'new')")
        await until_numbered(pool)
    assert [
        ("a", "insert", None),
        ("b", "insert", None),
        ("a", "delete", None),
        ("a", "insert", "new"),
        ("b", "delete", None),
    ] == contents(await everything(pool))


async def test_a_deleted_row_loses_its_content_in_every_topic_it_was_in(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await sql.execute("insert into app.notes values (1, 'a', 'secret')")
        await sql.execute("update app.notes set room = 'b'")
        await sql.execute("delete from app.notes")
        await until_numbered(pool)
    assert [
        ("room:a", "insert", None),
        ("room:a", "leave", None),
        ("room:b", "insert", None),
        ("room:b", "delete", None),
    ] == contents(await everything(pool))
    found = await PgLogReader(pool).read_topics([Topic("room:a")], Seq(0), Seq(100), 10)
    assert [None, None] == [change.record for change in found]


async def test_a_restored_row_keeps_its_later_content(database: str, pool: Pool, sql: Connection) -> None:
    async with leader(database, pool) as sequencer:
        await sql.execute("insert into app.notes values (1, 'a', 'secret')")
        await sql.execute("update app.notes set deleted_at = now()")
        await sql.execute("update app.notes set deleted_at = null, body = 'open'")
        await until_numbered(pool)
        expected = [("room:a", "insert", None), ("room:a", "delete", None), ("room:a", "restore", "open")]
        assert expected == contents(await everything(pool))
        await retention(pool, sequencer).purge()
        assert expected == contents(await everything(pool))


async def test_purging_empties_events_and_dead_letters_of_deleted_rows_only(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        await sql.execute("insert into app.notes values (1, 'a', 'secret'), (2, 'a', 'open')")
        await until_numbered(pool)
        changes = await everything(pool)
        await DeadLetters(pool).store_dead_letters([(change, "app", "too long") for change in changes])
        await sql.execute("delete from app.notes where id = 1")
        await until_numbered(pool)
        await sequencer.deletions.wait()
        await retention(pool, sequencer).purge()
        kept = await pool.fetch("select record ->> 'body' as body from rowcast.events order by id")
        dead_letters = await pool.fetch("select record ->> 'body' as body from rowcast.dead_letters order by seq")
    assert [None, "open", None] == [row["body"] for row in kept]
    assert [None, "open"] == [row["body"] for row in dead_letters]
    assert 0 == await pool.fetchval("select count(*) from rowcast.tombstones")


async def test_a_dead_letter_stored_after_the_deletion_has_no_content(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool):
        await sql.execute("insert into app.notes values (1, 'a', 'secret')")
        await until_numbered(pool)
        read = await everything(pool)  # by a daemon that is about to store a dead letter
        await sql.execute("delete from app.notes")
        await until_numbered(pool)
    await DeadLetters(pool).store_dead_letters([(read[0], "app", "too long")])
    assert await pool.fetchval("select record is null from rowcast.dead_letters")


async def test_purging_waits_for_dead_letters_that_are_being_stored(
    database: str, pool: Pool, sql: Connection
) -> None:
    async with leader(database, pool) as sequencer:
        await sql.execute("insert into app.notes values (1, 'a', 'secret')")
        await until_numbered(pool)
        async with pool.acquire() as other:
            writing = other.transaction()
            await writing.start()
            await other.execute(
                """insert into rowcast.dead_letters
                       (seq, pack, schema_name, table_name, topic, kind, key, record, reason)
                   select seq, 'app', schema_name, table_name, topic, 'insert', key::json, record::json, 'too long'
                   from rowcast.changes"""
            )
            await sql.execute("delete from app.notes")
            await until_numbered(pool)
            with pytest.raises(Exception, match="lock timeout"):
                async with pool.acquire() as impatient, impatient.transaction():
                    await impatient.execute("set local lock_timeout = '1ms'")
                    await impatient.execute("lock table rowcast.dead_letters in share row exclusive mode")
            await writing.commit()
        await retention(pool, sequencer).purge()
    assert await pool.fetchval("select record is null from rowcast.dead_letters")
