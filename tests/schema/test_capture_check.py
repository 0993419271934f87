"""What `drift` finds in the catalog of a real Postgres, one change by hand at a time."""

from collections.abc import AsyncIterator
from functools import partial

import pytest

from daemon.postgres.connect import Connection, connect
from daemon.postgres.errors import DatabaseFault
from daemon.schema import migrate
from daemon.schema.capture_check import check_captures, count_watched
from tests.support.folders import execute
from tests.support.postgres import Server, ignore

TABLES = """
create schema app;
create table app.notes (id integer primary key, room text);
select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id}');
create table app.days (id integer primary key) partition by range (id);
create table app.days_1 partition of app.days for values from (0) to (10);
select rowcast.watch('app.days', $$'days'$$, '{id}');
create table app.fed (id integer primary key) partition by range (id);
create table app.fed_1 partition of app.fed for values from (0) to (10);
select rowcast.watch('app.fed', $$'fed'$$, '{id}', per_row => true);
"""
RENEW = "run `daemon --apply-ddl`, or rowcast.watch() again if no pack watches it"
AFRESH = "in one transaction, rowcast.unwatch() it and rowcast.watch() it again"


@pytest.fixture
async def sql(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with Rowcast's own schema alone; what is done in it is undone."""
    async with postgres.undone("rowcast", partial(migrate.apply, packs=(), report=ignore)) as connection:
        yield connection


@pytest.fixture
async def tables(sql: Connection) -> Connection:
    await sql.execute(TABLES)
    return sql


async def found(sql: Connection) -> list[str]:
    return [str(one) for one in await check_captures(sql)]


async def capture_function(sql: Connection, table: str) -> str:
    name: str = await sql.fetchval("select function_name from rowcast.watched where table_name = $1", table)
    return f"rowcast.{name}"


async def test_tables_that_are_captured_as_they_were_set_up_have_not_drifted(tables: Connection) -> None:
    assert [] == await found(tables)
    assert await tables.fetchval("select count(*) from rowcast.watched") == await count_watched(tables)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "alter table app.notes disable trigger rowcast_update",
            f"app.notes: its capture trigger on app.notes for update is disabled: {RENEW}",
        ),
        (
            "alter table app.notes disable trigger all",
            f"app.notes: its capture trigger on app.notes for insert, update, delete, truncate is disabled: {RENEW}",
        ),
        (
            "alter table app.notes enable replica trigger rowcast_insert",
            f"app.notes: its capture trigger on app.notes for insert fires in replica mode only: {RENEW}",
        ),
        (
            "alter table app.notes enable always trigger rowcast_insert",
            "app.notes: its capture trigger on app.notes for insert is enabled always, so replication would fire it "
            f"too: {RENEW}",
        ),
        (
            "drop trigger rowcast_delete on app.notes",
            f"app.notes: its capture trigger on app.notes for delete is missing: {RENEW}",
        ),
        (
            "create table app.days_2 partition of app.days for values from (10) to (20)",
            "app.days: its capture trigger on app.days_2 for insert, update, delete, truncate is missing: " + RENEW,
        ),
        (
            "create table app.fed_2 partition of app.fed for values from (10) to (20)",
            f"app.fed: its capture trigger on app.fed_2 for truncate is missing: {RENEW}",
        ),
        (
            "alter table app.fed_1 enable trigger rowcast_truncate",
            "app.fed: its capture trigger on app.fed_1 for truncate is not enabled always, as row triggers are here: "
            + RENEW,
        ),
    ],
)
async def test_a_trigger_that_does_not_fire_as_it_should_is_named_and_applying_again_mends_it(
    tables: Connection, change: str, said: str
) -> None:
    await tables.execute(change)
    assert [said] == await found(tables)
    await tables.execute("select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id}')")
    await tables.execute("select rowcast.watch('app.days', $$'days'$$, '{id}')")
    await tables.execute("select rowcast.watch('app.fed', $$'fed'$$, '{id}', per_row => true)")
    assert [] == await found(tables)


async def watch_notes_afresh(sql: Connection) -> None:
    async with sql.transaction():
        await sql.execute("select rowcast.unwatch('app.notes')")
        await sql.execute("select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id}')")


@pytest.mark.parametrize(
    "change",
    [
        "create or replace function {} () returns trigger language plpgsql security definer "
        "set search_path = pg_catalog, pg_temp set timezone = 'UTC' as 'begin return null; end'",
        "alter function {} security invoker",
        "alter function {} reset timezone",
        "alter function {} set search_path = public",
    ],
)
async def test_a_capture_function_that_was_altered_is_named_and_watching_afresh_mends_it(
    tables: Connection, change: str
) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(change.format(function))
    assert [f"app.notes: its capture function {function} is not what rowcast.watch() made: {AFRESH}"] == await found(
        tables
    )
    await watch_notes_afresh(tables)
    assert [] == await found(tables)


async def test_a_capture_function_of_somebody_else_is_named(tables: Connection) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(f"alter function {function} owner to current_user")
    assert [f"app.notes: its capture function {function} does not belong to rowcast_capture: {AFRESH}"] == (
        await found(tables)
    )
    await watch_notes_afresh(tables)
    assert [] == await found(tables)


async def test_a_capture_function_that_was_dropped_is_named_once(tables: Connection) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(f"drop function {function} cascade")
    assert [f"app.notes: its capture function {function} is missing: {RENEW}"] == await found(tables)
    await tables.execute("select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id}')")
    assert [] == await found(tables)


async def test_a_trigger_that_was_made_anew_with_a_condition_is_named(tables: Connection) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(
        "drop trigger rowcast_insert on app.notes; create trigger rowcast_insert after insert on app.notes "
        f"referencing new table as new_rows for each statement when (false) execute function {function}()"
    )
    assert [
        f"app.notes: its capture trigger on app.notes for insert is not what rowcast.watch() made: {AFRESH}"
    ] == await found(tables)
    await watch_notes_afresh(tables)
    assert [] == await found(tables)


async def test_a_row_trigger_that_is_disabled_on_one_partition_is_named(tables: Connection) -> None:
    await tables.execute("alter table app.fed_1 disable trigger rowcast_insert")
    assert [f"app.fed: its capture trigger on app.fed_1 for insert is disabled: {AFRESH}"] == await found(tables)
    async with tables.transaction():
        await tables.execute("select rowcast.unwatch('app.fed')")
        await tables.execute("select rowcast.watch('app.fed', $$'fed'$$, '{id}', per_row => true)")
    assert [] == await found(tables)


async def test_a_partition_that_was_detached_still_captures_and_is_named(tables: Connection) -> None:
    await tables.execute("alter table app.days detach partition app.days_1")
    assert [
        "app.days: app.days_1 is captured as this table: drop its triggers rowcast_delete, rowcast_insert, "
        "rowcast_truncate, rowcast_update, or give it its old place again"
    ] == await found(tables)


async def test_a_table_that_was_dropped_is_named_until_it_is_forgotten(tables: Connection) -> None:
    await tables.execute("drop table app.notes")
    assert [
        "app.notes: the table is gone or has another name: rename it back, or call rowcast.unwatch_dropped() if it "
        "was dropped"
    ] == await found(tables)
    await tables.execute("select rowcast.unwatch_dropped()")
    assert [] == await found(tables)


async def test_a_table_that_was_renamed_is_named_with_where_it_is_now(tables: Connection) -> None:
    await tables.execute('alter table app.notes rename to "New Notes"')
    assert ["the table is gone or has another name", 'app."New Notes" is captured as this table'] == [
        one.problem for one in await check_captures(tables)
    ]
    await tables.execute('alter table app."New Notes" rename to notes')
    assert [] == await found(tables)


@pytest.fixture
async def subscribed(tables: Connection, postgres: Server) -> AsyncIterator[Connection]:
    """Subscriptions that feed app.notes and app.fed from a second database; nothing runs, the catalog knows them."""
    async with postgres.database() as publisher:
        await execute(
            publisher,
            "create schema app; create table app.notes (id integer primary key, room text);"
            "create table app.fed_1 (id integer primary key);"
            "set client_min_messages = error; create publication all_tables for table app.notes, app.fed_1",
        )
        await tables.execute(
            f"create subscription feed connection '{publisher}' publication all_tables "
            "with (enabled = false, create_slot = false, slot_name = none, copy_data = false)"
        )
        yield tables
        await tables.execute("drop subscription feed")


async def test_a_subscription_that_feeds_a_table_captured_by_statement_is_named(subscribed: Connection) -> None:
    assert [
        "app.notes: a subscription feeds app.notes, and replication fires no statement triggers: rowcast.watch() it "
        "again with per_row => true"
    ] == await found(subscribed)
    await subscribed.execute("select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id}', per_row => true)")
    assert [] == await found(subscribed)


async def test_a_role_that_may_read_what_is_watched_and_nothing_else_sees_the_same(subscribed: Connection) -> None:
    await subscribed.execute("create role plain")
    try:
        await subscribed.execute(
            "grant usage on schema rowcast to plain; grant select on rowcast.watched to plain; set role plain"
        )
        assert ["app.notes"] == [one.table for one in await check_captures(subscribed)]
    finally:
        await subscribed.execute("reset role; drop owned by plain; drop role plain")


async def test_a_database_without_rowcast_is_an_operators_fault(empty_database: str) -> None:
    connection = await connect(empty_database, application_name="test")
    for ask in (check_captures, count_watched):
        with pytest.raises(DatabaseFault):
            await ask(connection)
    await connection.close()
