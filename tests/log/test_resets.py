"""Resets after changes that nobody captured."""

from daemon.postgres.connect import Connection, Pool
from daemon.schema.health import SchemaHealth
from daemon.settings import Settings
from tests.support.log import leader

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
