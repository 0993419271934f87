"""Under a publication for all tables, Rowcast updates and deletes its own rows all the same."""

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial

import pytest

from daemon.core.change import Seq
from daemon.log.dead_letters import DeadLetters, Selection, drop
from daemon.log.queries import query
from daemon.log.reader import PgLogReader
from daemon.log.retention import DROP_SETTINGS, Retention
from daemon.postgres.connect import SESSION, Connection, Pool, acquired, connect, open_pool
from tests.support.log import ROWS, leader, until_numbered
from tests.support.postgres import FAST, Server, running_server

WITHOUT_IDENTITY = """
select c.relname as name from pg_class as c
where c.relnamespace = 'rowcast'::regnamespace and c.relkind in ('r', 'p')
  and not (c.relreplident = 'f' or c.relreplident in ('d', 'i') and exists (
      select from pg_index as i where i.indrelid = c.oid
      and case c.relreplident when 'd' then i.indisprimary else i.indisreplident end))
order by 1
"""


@pytest.fixture(scope="module")
async def logical() -> AsyncIterator[Server]:
    """A server whose changes can be decoded: only there does Postgres ask for replica identities."""
    async with running_server(FAST | {"wal_level": "logical"}) as server:
        yield server


@pytest.fixture
async def published(logical: Server) -> AsyncIterator[str]:
    async with logical.chatgenius() as dsn:
        sql = await connect(dsn, application_name="test")
        await sql.execute(ROWS)
        await sql.execute("create publication everything for all tables")
        await sql.close()
        yield dsn


async def next_segment(pool: Pool, retention: Retention) -> None:
    """Make the leader open the next segment, all older ones expire, and the sweep see to the rest."""
    terms = "select max(term) from rowcast.terms"
    before = await pool.fetchval(terms)
    await pool.execute("update rowcast.segments set opened_at = opened_at - interval '8 days'")
    await retention.sweep()
    while before == await pool.fetchval(terms):
        await asyncio.sleep(0)


async def test_purging_sweeping_and_forgetting_work_under_a_publication_for_all_tables(published: str) -> None:
    pool = await open_pool(published, application_name="test", server_settings=SESSION, max_size=5)
    connecting = partial(connect, published, application_name="retention", server_settings=DROP_SETTINGS)
    async with leader(published, pool) as sequencer:
        retention = Retention(pool, connecting, sequencer, timedelta(days=7))
        await pool.execute("insert into chatgenius.channels (name) values ('one')")
        await pool.execute("update app.rows set version = 1")
        await until_numbered(pool)
        changes = await PgLogReader(pool).read(Seq(0), 1000)
        await DeadLetters(pool).store_dead_letters([(change, "app", "a test") for change in changes])
        await pool.execute("delete from app.rows where id <= 2")
        await until_numbered(pool)
        await retention.purge()
        assert 0 == await pool.fetchval("select count(*) from rowcast.tombstones")
        purged = "select count(*) from rowcast.{} where key ->> 'id' in ('1', '2') and record is not null"
        assert [0, 0] == [await pool.fetchval(purged.format(table)) for table in ("events", "dead_letters")]
        async with acquired(pool, 10) as connection:
            assert 1 == await drop(connection, Selection(seqs=[changes[0].seq]))
        await pool.execute(query("forget_batches"), (await PgLogReader(pool).head()).seq)
        while await pool.fetchval("select exists (select from pg_class where relname in ('log_0', 'events_0'))"):
            await pool.execute("update app.rows set version = version + 1 where id = 3")
            await until_numbered(pool)
            await next_segment(pool, retention)
        for table in ("grants", "dead_letters"):
            assert 0 == await pool.fetchval(f"select count(*) from rowcast.{table}")
        await pool.execute("update app.rows set version = 2 where id = 3")
        await until_numbered(pool)
        await pool.execute("delete from app.rows")
        await until_numbered(pool)
        await retention.purge()
    assert [] == [row["name"] for row in await pool.fetch(WITHOUT_IDENTITY)]
    await pool.close()


async def test_every_table_of_rowcast_has_a_replica_identity_and_so_has_every_new_segment(sql: Connection) -> None:
    made = await sql.fetchval("select rowcast.make_segment()")
    assert [] == [row["name"] for row in await sql.fetch(WITHOUT_IDENTITY)]
    await sql.execute(f"alter table rowcast.events_{made} replica identity default")
    await sql.execute("create table rowcast.without (id integer)")
    found = [row["name"] for row in await sql.fetch(WITHOUT_IDENTITY)]
    assert [f"events_{made}", "without"] == found
