"""Resets after changes that nobody captured."""

from collections.abc import AsyncIterator
from functools import partial

import pytest

from daemon.postgres.connect import Connection, Pool
from daemon.schema import migrate
from daemon.schema.health import SchemaHealth
from daemon.settings import Settings
from tests.support.cases import for_each
from tests.support.log import leader
from tests.support.postgres import Server, ignore

UNLOGGED = """
create schema app;
create unlogged table app.carts (id integer primary key);
create table app.orders (id integer primary key);
select rowcast.watch('app.carts', $$'cart:' || r.id$$, '{id}');
select rowcast.watch('app.orders', $$'order:' || r.id$$, '{id}');
"""
EVENTS = """
select w.table_name, e.topic, e.kind from rowcast.events as e join rowcast.watched as w on w.id = e.watch
order by e.id
"""


async def events(sql: Connection) -> list[tuple[str, str, str]]:
    return [tuple(row) for row in await sql.fetch(EVENTS)]


async def test_an_unlogged_table_that_a_crash_has_emptied_resets_its_pack(
    database: str, sql: Connection, pool: Pool
) -> None:
    await sql.execute(UNLOGGED)
    async with leader(database, pool):
        assert [] == await events(sql)
    await sql.execute("truncate rowcast.since_crash")  # as recovery does with each unlogged table
    async with leader(database, pool):
        assert [("carts", "*app", "truncate")] == await events(sql)
    async with leader(database, pool):
        assert 1 == len(await events(sql))


async def test_a_table_whose_capture_breaks_and_is_mended_resets_its_pack_each_time(
    database: str, sql: Connection, pool: Pool
) -> None:
    await sql.execute(UNLOGGED)
    health = SchemaHealth(pool, Settings())
    await health.refresh()
    assert [] == await events(sql)
    await sql.execute("alter table app.orders disable trigger all")
    await health.refresh()
    assert [("orders", "*app", "lost")] == await events(sql)
    await sql.execute("alter table app.orders enable trigger all")
    await health.refresh()
    await health.refresh()
    assert [("orders", "*app", "lost")] * 2 == await events(sql)


PARTITIONED = """
create schema app;
create table app.hits (id integer primary key, room text not null) partition by range (id);
create table app.hits_0 partition of app.hits for values from (0) to (10);
create table app.hits_1 partition of app.hits for values from (10) to (20);
insert into app.hits values (1, 'a'), (11, 'a');
"""
DETACHED = """
alter table app.hits detach partition app.hits_1;
update app.hits_1 set room = 'b';
alter table app.hits attach partition app.hits_1 for values from (10) to (20);
"""


async def test_rows_that_went_with_a_partition_reset_its_pack_once(sql: Connection, pool: Pool) -> None:
    await sql.execute(PARTITIONED)
    await sql.execute("select rowcast.watch('app.hits', 'r.room', '{id}')")
    daemons = [SchemaHealth(pool, Settings()) for _ in range(2)]
    for health in daemons:
        await health.refresh()
    await sql.execute("vacuum full app.hits")
    await sql.execute("truncate app.hits_0")
    await sql.execute("drop table app.hits_1")
    for health in daemons * 2:
        await health.refresh()
    assert [("hits", "*app", "truncate"), ("hits", "*app", "lost")] == await events(sql)
    assert [] == daemons[0].problems


@pytest.mark.parametrize("per_row", [False, True])
@for_each(
    ("change", "resets"),
    [
        ("drop table app.hits_1", (True, True)),
        ("alter table app.hits detach partition app.hits_1; drop table app.hits_1", (True, True)),
        # The triggers of statements stay where they are, and fire. Postgres drops and makes those of rows.
        (DETACHED, (False, True)),
        ("drop table app.hits", (True, True)),
        ("alter table app.hits add column more text", (False, False)),
        ("alter table app.hits alter column room type varchar", (False, False)),
        ("alter table app.hits_1 rename to hits_one; alter schema app rename to application", (False, False)),
        ("create table app.hits_2 partition of app.hits for values from (20) to (30)", (False, False)),
        ("select rowcast.watch('app.hits', 'r.room', '{id}', on_error => 'lenient')", (False, False)),
        ("select rowcast.unwatch('app.hits')", (False, False)),
    ],
)
async def test_a_trigger_that_is_gone_without_having_been_dropped_by_rowcast_means_that_rows_are_gone(
    rowcast_alone: Connection, per_row: bool, change: str, resets: tuple[bool, bool]
) -> None:
    sql = rowcast_alone
    await sql.execute(PARTITIONED)
    await sql.execute("select rowcast.watch('app.hits', 'r.room', '{id}', per_row => $1)", per_row)
    assert [] == await sql.fetch("select rowcast.reset_vanished()")
    await sql.execute(change)
    gone = [name for [name] in await sql.fetch("select rowcast.reset_vanished()")]
    assert (["app.hits"] if resets[per_row] else []) == gone
    assert [] == await sql.fetch("select rowcast.reset_vanished()")


@pytest.fixture
async def rowcast_alone(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with Rowcast's own schema alone; what is done in it is undone."""
    async with postgres.undone("rowcast", partial(migrate.apply, packs=(), report=ignore)) as connection:
        yield connection
