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

ATTACHED = """
create table app.hits_2 (like app.hits);
insert into app.hits_2 values (21, 'a');
alter table app.hits attach partition app.hits_2 for values from (20) to (30);
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
        # The triggers of statements stay where they are; reset_altered() finds these rows. Postgres drops and
        # makes those of rows.
        (DETACHED, (False, True)),
        ("drop table app.hits", (True, True)),
        # The triggers of statements are missing there, which the look notices by itself.
        (ATTACHED, (False, True)),
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


async def test_triggers_that_were_off_between_two_looks_reset_the_pack_and_those_that_still_are_do_so_once(
    database: str, sql: Connection, pool: Pool
) -> None:
    await sql.execute(UNLOGGED)
    daemons = [SchemaHealth(pool, Settings()) for _ in range(2)]
    for health in daemons:
        await health.refresh()
    off, on = (f"alter table app.orders {how} trigger all" for how in ("disable", "enable"))
    await sql.execute(f"{off}; insert into app.orders values (1); {on}")
    for health in daemons:
        await health.refresh()
    assert [("orders", "*app", "lost")] == await events(sql)
    for expected, statement in ((2, off), (3, on)):
        await sql.execute(statement)
        for _ in range(2):
            await daemons[0].refresh()
        assert expected == len(await events(sql))


ALTERED = """
create schema app;
create type app.mood as enum ('sad', 'ok');
create type app.pair as (x integer, k text);
create domain app.pairs as app.pair[];
create type app.span as range (subtype = app.mood);
create table app.hits (
    id integer primary key, room text not null, a text, b text, n integer, v varchar(10), amount numeric(10, 2),
    mood app.mood, p app.pair, ps app.pairs, span app.span, other text, more app.mood,
    g text generated always as (other || '!') stored
);
insert into app.hits values (1, 'a', 'a', 'b', 1, 'v', 1, 'sad', '(1,k)', '{"(1,k)"}', '[sad,ok]', 'o', 'sad');
create table app.days (id integer primary key, room text, other text) partition by range (id);
create table app.days_0 partition of app.days for values from (0) to (10);
create table app.parent (id integer primary key, room text, other text);
create table app.child (primary key (id)) inherits (app.parent);
select rowcast.watch('app.hits', 'r.room', '{id,b,n,v,amount,mood,p,ps,span}');
select rowcast.watch('app.days', 'r.room', '{id,room}');
select rowcast.watch('app.child', 'r.room', '{id,room}', per_row => true);
"""


@for_each(
    ("change", "tables"),
    [
        ("alter table app.hits alter column n type bigint", "app.hits"),
        ("alter table app.hits alter column n type integer using n + 1", "app.hits"),
        ("alter table app.hits alter column room type text using upper(room)", "app.hits"),  # the topic
        ("alter table app.hits alter column v type varchar(5)", "app.hits"),
        ("alter table app.hits rename column n to m; alter table app.hits rename column a to n", "app.hits"),
        (
            "alter table app.hits rename column v to c; alter table app.hits rename column b to v;"
            " alter table app.hits rename column c to b",
            "app.hits",
        ),
        ("alter table app.hits drop column p; alter table app.hits add column p app.pair", "app.hits"),
        ("alter type app.mood rename value 'ok' to 'fine'", "app.hits"),
        ("alter type app.pair add attribute y integer", "app.hits"),
        ("alter type app.pair drop attribute x", "app.hits"),
        ("alter type app.pair rename attribute x to z", "app.hits"),
        ("alter table app.days alter column room type text using upper(room)", "app.days"),
        (
            "alter table app.days detach partition app.days_0; insert into app.days_0 values (1, 'a');"
            " alter table app.days attach partition app.days_0 for values from (0) to (10)",
            "app.days",
        ),
        ("alter table app.parent alter column room type text using upper(room)", "app.child"),
        (
            "alter table app.parent rename column room to c; alter table app.parent rename column other to room",
            "app.child",
        ),
    ],
)
async def test_rows_that_read_otherwise_after_their_table_or_type_was_altered_reset_its_pack_once(
    rowcast_alone: Connection, change: str, tables: str
) -> None:
    sql = rowcast_alone
    await sql.execute(ALTERED)
    await sql.execute(change)
    assert tables == await sql.fetchval("select string_agg(t, ' ') from rowcast.reset_altered() as r (t)")
    assert [] == await sql.fetch("select rowcast.reset_altered()")


@for_each(
    "change",
    [
        "alter type app.mood add value 'fine' before 'ok'",
        "alter type app.mood rename to moods; alter type app.pair set schema public",
        "alter domain app.pairs add check (cardinality(value) < 100)",
        "alter table app.hits alter column b type varchar",
        "alter table app.hits alter column v type varchar(20), alter column amount type numeric(12, 2)",
        "alter table app.hits alter column b set statistics 10, alter column b set storage external",
        "alter table app.hits alter column b set not null, alter column b set default 'b'",
        "alter table app.hits alter column a type text using upper(a)",
        "alter table app.hits rename column a to c; alter table app.hits rename column other to a",
        "alter table app.hits drop column a; alter table app.hits add column a text",
        "alter table app.hits add column at float default random()",
        "alter table app.hits set unlogged",
        "alter table app.hits rename to hit; alter table app.hit rename to hits",
        "analyze app.hits",
        "cluster app.hits using hits_pkey",
        "truncate app.hits",
        "grant select (b, n) on app.hits to public",
        "create table app.days_1 partition of app.days for values from (10) to (20)",
        "alter table app.days detach partition app.days_0",
        "alter table app.parent alter column other type text using upper(other)",
    ],
)
async def test_what_alters_no_row_as_it_was_sent_resets_nothing(rowcast_alone: Connection, change: str) -> None:
    sql = rowcast_alone
    await sql.execute(ALTERED)
    await sql.execute(change)
    assert [] == await sql.fetch("select rowcast.reset_altered()")


async def test_a_table_that_vacuum_has_rewritten_resets_nothing_and_one_that_was_altered_does(
    sql: Connection, pool: Pool
) -> None:
    await sql.execute(ALTERED)
    daemons = [SchemaHealth(pool, Settings()) for _ in range(2)]
    for table in ("app.hits", "app.days", "app.child", "pg_catalog.pg_attribute", "pg_catalog.pg_inherits"):
        await sql.execute(f"vacuum (full, freeze) {table}")
    for health in daemons:
        await health.refresh()
    assert [] == await events(sql)
    await sql.execute("alter table app.days alter column room type text using upper(room)")
    for health in daemons:
        await health.refresh()
    assert [("days", "*app", "lost")] == await events(sql)


async def test_a_generated_column_that_gets_another_expression_resets_the_pack(rowcast_alone: Connection) -> None:
    sql = rowcast_alone
    if sql.get_server_version().major < 17:
        return  # it has no such statement
    await sql.execute("""
        create schema app;
        create table app.made (id integer primary key, g integer generated always as (id + 1) stored);
        select rowcast.watch('app.made', $$'made'$$, '{id,g}');
        alter table app.made alter column g set expression as (id + 2)
    """)
    assert ["app.made"] == [name for [name] in await sql.fetch("select rowcast.reset_altered()")]


@for_each("before", ["select", "select rowcast.unwatch('app.days')"])
async def test_a_table_that_is_watched_again_after_it_was_altered_resets_its_pack(
    rowcast_alone: Connection, before: str
) -> None:
    sql = rowcast_alone
    await sql.execute(f"""
        {ALTERED};
        {before};
        alter table app.days rename column room to c;
        alter table app.days rename column other to room;
        alter table app.days rename column c to other;
        select rowcast.watch('app.days', 'r.room', '{{id,room}}')
    """)
    assert [("days", "*app", "lost")] == await events(sql)
    assert [] == await sql.fetch("select rowcast.reset_altered()")


async def test_a_database_that_has_not_noted_how_its_rows_are_read_resets_nothing_at_the_first_look(
    rowcast_alone: Connection,
) -> None:
    sql = rowcast_alone
    await sql.execute(ALTERED)
    await sql.execute("truncate rowcast.layouts; update rowcast.capturing set version = null")
    for look in ("reset_altered", "reset_vanished"):
        assert [] == await sql.fetch(f"select rowcast.{look}()")
    await sql.execute("alter type app.mood rename value 'ok' to 'fine'")
    assert ["app.hits"] == [name for [name] in await sql.fetch("select rowcast.reset_altered()")]


async def test_a_column_that_was_gone_at_one_look_and_is_another_one_at_the_next_resets_the_pack(
    rowcast_alone: Connection,
) -> None:
    sql = rowcast_alone
    await sql.execute(ALTERED)
    await sql.execute("alter table app.hits rename column n to m")
    assert [] == await sql.fetch("select rowcast.reset_altered()")  # that the column is gone is another problem
    await sql.execute("alter table app.hits rename column a to n")
    assert ["app.hits"] == [name for [name] in await sql.fetch("select rowcast.reset_altered()")]


@pytest.fixture
async def rowcast_alone(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with Rowcast's own schema alone; what is done in it is undone."""
    async with postgres.undone("rowcast", partial(migrate.apply, packs=(), report=ignore)) as connection:
        yield connection
