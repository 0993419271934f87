"""What check_captures finds in the catalog of a real Postgres, for one manual change at a time."""

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
REAPPLY = "run `daemon --apply-ddl`"
APPLY_AGAIN = "select rowcast.serve_again()"
"""What `daemon --apply-ddl` does to tables that belong to no pack."""


@pytest.fixture
async def sql(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with Rowcast's own schema alone; what is done in it is undone."""
    async with postgres.undone("rowcast", partial(migrate.apply, packs=(), report=ignore)) as connection:
        yield connection


@pytest.fixture
async def tables(sql: Connection) -> Connection:
    await sql.execute(TABLES)
    return sql


async def problems(sql: Connection) -> list[str]:
    return [str(problem) for problem in await check_captures(sql)]


async def capture_function(sql: Connection, table: str) -> str:
    name: str = await sql.fetchval("select function_name from rowcast.watched where table_name = $1", table)
    return f"rowcast.{name}"


async def test_tables_that_are_captured_as_defined_have_no_problems(tables: Connection) -> None:
    assert [] == await problems(tables)
    assert await tables.fetchval("select count(*) from rowcast.watched") == await count_watched(tables)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            "alter table app.notes disable trigger rowcast_update",
            f"app.notes: its capture trigger on app.notes for update is disabled: {REAPPLY}",
        ),
        (
            "alter table app.notes disable trigger all",
            "app.notes: its capture trigger on app.notes for insert, update, delete, truncate is disabled: "
            + REAPPLY,
        ),
        (
            "alter table app.notes enable replica trigger rowcast_insert",
            f"app.notes: its capture trigger on app.notes for insert fires in replica mode only: {REAPPLY}",
        ),
        (
            "alter table app.notes enable always trigger rowcast_insert",
            "app.notes: its capture trigger on app.notes for insert is ENABLE ALWAYS, so replication would fire it "
            f"too: {REAPPLY}",
        ),
        (
            "drop trigger rowcast_delete on app.notes",
            f"app.notes: its capture trigger on app.notes for delete is missing: {REAPPLY}",
        ),
        (
            "create table app.days_2 partition of app.days for values from (10) to (20)",
            "app.days: its capture trigger on app.days_2 for insert, update, delete, truncate is missing: " + REAPPLY,
        ),
        (
            'alter table app.days_1 disable trigger "~rowcast_move"',
            f"app.days: its capture trigger on app.days_1 for move is disabled: {REAPPLY}",
        ),
        (
            "create table app.fed_2 partition of app.fed for values from (10) to (20)",
            f"app.fed: its capture trigger on app.fed_2 for truncate is missing: {REAPPLY}",
        ),
        (
            "alter table app.fed_1 enable trigger rowcast_truncate",
            "app.fed: its capture trigger on app.fed_1 for truncate is not ENABLE ALWAYS, as per_row requires: "
            + REAPPLY,
        ),
    ],
)
async def test_a_trigger_that_does_not_fire_as_defined_is_reported_and_applying_again_repairs_it(
    tables: Connection, change: str, problem: str
) -> None:
    await tables.execute(change)
    assert [problem] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


@pytest.mark.parametrize(
    "change",
    [
        "create or replace function {} () returns trigger language plpgsql security definer "
        "set search_path = pg_catalog, pg_temp set timezone = 'UTC' as 'begin return null; end'",
        "alter function {} security invoker",
        "alter function {} reset timezone",
        "alter function {} set search_path = public",
        "alter function {} stable",
    ],
)
async def test_an_altered_capture_function_is_reported_and_applying_again_repairs_it(
    tables: Connection, change: str
) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(change.format(function))
    assert [
        f"app.notes: its capture function {function} differs from what rowcast.watch() created: {REAPPLY}"
    ] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


async def test_a_capture_function_with_another_owner_is_reported(tables: Connection) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(f"alter function {function} owner to current_user")
    assert [f"app.notes: its capture function {function} is not owned by rowcast_capture: {REAPPLY}"] == (
        await problems(tables)
    )
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


async def test_a_snapshot_function_that_is_missing_or_altered_is_reported_and_mended(tables: Connection) -> None:
    function = (await capture_function(tables, "notes")).replace("capture_", "snapshot_")
    altered = f"its snapshot function {function} differs from what rowcast.watch() created"
    await tables.execute(f"alter function {function} reset timezone")
    assert [f"app.notes: {altered}: {REAPPLY}"] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)
    await tables.execute(f"drop function {function}")
    assert [f"app.notes: the function that reads it for snapshots is missing: {REAPPLY}"] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


async def test_a_dropped_capture_function_is_reported_once(tables: Connection) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(f"drop function {function} cascade")
    assert [f"app.notes: its capture function {function} is missing: {REAPPLY}"] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


@pytest.mark.parametrize(
    "how",
    [
        "referencing new table as new_rows for each statement when (false)",
        "referencing new table as others for each statement",
        "for each statement",
    ],
)
async def test_a_trigger_that_was_recreated_otherwise_is_reported(tables: Connection, how: str) -> None:
    function = await capture_function(tables, "notes")
    await tables.execute(
        "drop trigger rowcast_insert on app.notes; "
        f"create trigger rowcast_insert after insert on app.notes {how} execute function {function}()"
    )
    assert [
        "app.notes: its capture trigger on app.notes for insert differs from what rowcast.watch() created: " + REAPPLY
    ] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


@pytest.mark.parametrize("kind", ["capture", "snapshot"])
@pytest.mark.parametrize("role", ["public", "pg_monitor"])
async def test_a_role_that_may_call_a_function_of_capture_is_reported_and_the_statement_ends_that(
    tables: Connection, kind: str, role: str
) -> None:
    function = (await capture_function(tables, "notes")).replace("capture_", f"{kind}_")
    await tables.execute(f"grant execute on function {function} to {role}")
    [problem] = await check_captures(tables)
    assert ("app.notes", f"{role} may call its function {function}") == (
        problem.table,
        problem.problem.partition("(")[0],
    )
    await tables.execute(problem.remedy)
    assert [] == await problems(tables)


async def test_a_replaced_right_is_reported_even_if_its_settings_are_gone(tables: Connection) -> None:
    await tables.execute("""
        create table app.own (id integer primary key, owner text);
        select rowcast.serve('app.own', $$'own:' || r.owner$$, $$topic = 'own:' || user_id$$);
    """)
    assert [] == await problems(tables)
    number = await tables.fetchval("select id from rowcast.watched where table_name = 'own'")
    await tables.execute(f"""
        create or replace function rowcast.may_read_{number}(topic text, user_id text) returns boolean
        language sql stable security definer as 'select true'
    """)
    [problem] = await check_captures(tables)
    assert f"its function rowcast.may_read_{number} differs from what rowcast.serve() created" == problem.problem
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


async def test_a_row_trigger_that_is_disabled_on_one_partition_is_reported(tables: Connection) -> None:
    await tables.execute("alter table app.fed_1 disable trigger rowcast_insert")
    assert [f"app.fed: its capture trigger on app.fed_1 for insert is disabled: {REAPPLY}"] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


async def test_a_partitioned_table_that_is_captured_as_older_versions_did_is_reported_until_it_is_watched_again(
    tables: Connection,
) -> None:
    await tables.execute('drop trigger "~rowcast_move" on app.days')
    missing = "its capture trigger on {} for move is missing"
    assert [
        f"app.days: {missing.format('app.days')}: {REAPPLY}",
        f"app.days: {missing.format('app.days_1')}: {REAPPLY}",
    ] == await problems(tables)
    await tables.execute(APPLY_AGAIN)
    assert [] == await problems(tables)


async def test_the_triggers_of_a_detached_partition_are_a_note(tables: Connection) -> None:
    await tables.execute("alter table app.days detach partition app.days_1")
    [found] = await check_captures(tables)
    assert found.is_note
    assert (
        "app.days: app.days_1, which was its partition, has its capture triggers still, and tells nothing: attach it "
        "back, or drop trigger rowcast_delete on app.days_1; drop trigger rowcast_insert on app.days_1; "
        "drop trigger rowcast_truncate on app.days_1; drop trigger rowcast_update on app.days_1"
    ) == str(found)


NOT_CAPTURED = "its sessions fire no capture triggers, so what they write is not captured"


async def test_settings_that_turn_capture_off_are_reported_with_the_statement_that_ends_them(
    tables: Connection,
) -> None:
    name = await tables.fetchval("select format('%I', current_database())")
    await tables.execute('create role "Loader" nologin')
    for place, is_note in (
        (f"database {name}", False),
        ('role "Loader"', True),
        (f'role "Loader" in database {name}', True),
    ):
        await tables.execute(f"alter {place} set session_replication_role = 'Replica'")
        [found] = await check_captures(tables)
        assert f"{place}: {NOT_CAPTURED}: alter {place} reset session_replication_role" == str(found)
        assert is_note == found.is_note
        await tables.execute(found.remedy)
        assert [] == await problems(tables)


async def test_a_dropped_table_is_reported_until_it_is_unwatched(tables: Connection) -> None:
    await tables.execute("drop table app.notes")
    assert [
        "app.notes: the table was dropped or renamed: rename it back, or run `daemon unwatch` for it; for a table "
        "of a pack, call rowcast.unwatch_dropped()"
    ] == await problems(tables)
    await tables.execute("select rowcast.unwatch_dropped()")
    assert [] == await problems(tables)


async def test_a_renamed_table_is_reported_with_its_new_name(tables: Connection) -> None:
    await tables.execute('alter table app.notes rename to "New Notes"')
    assert ["the table was dropped or renamed", 'app."New Notes" is captured as this table'] == [
        problem.problem for problem in await check_captures(tables)
    ]
    await tables.execute('alter table app."New Notes" rename to notes')
    assert [] == await problems(tables)


SHOP = """
create schema shop;
create table shop.rooms (id integer primary key, name text);
create table shop.seats (
    id integer primary key, room_id integer not null, label text, gone_at timestamptz, unused text
);
grant usage on schema shop to rowcast_capture;
grant select on shop.rooms to rowcast_capture;
"""
WATCH_SEATS = """
select rowcast.watch(
    'shop.seats', $$(select 'room:' || m.name from shop.rooms as m where m.id = r.room_id)$$, '{id, label}',
    soft_delete => 'gone_at'
)
"""
CASELESS = """
    do $$ begin
        create collation shop.caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    exception when feature_not_supported or invalid_parameter_value or undefined_object then
        create collation shop.caseless from "C";  -- this Postgres is built without ICU
    end $$;
"""
DETERMINISTIC = "select collisdeterministic from pg_collation where collname = 'caseless'"
COLUMN_GONE = "rename it back or add it again, or call rowcast.watch() for it without that column"
EXPRESSION = "put back what they read, or call rowcast.watch() for it with others"
ROW_SECURITY = (
    "row security applies to rowcast_capture, which reads it: writes that need that fail: "
    "alter role rowcast_capture bypassrls, or disable row security for it"
)


@pytest.fixture
async def shop(sql: Connection) -> Connection:
    await sql.execute(SHOP + WATCH_SEATS)
    assert [] == await problems(sql)
    return sql


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            "alter table shop.seats rename column label to title",
            f"shop.seats: its captured column label was dropped or renamed: {COLUMN_GONE}",
        ),
        (
            "alter table shop.seats drop column label, drop column gone_at",
            f"shop.seats: its captured column label, gone_at was dropped or renamed: {COLUMN_GONE}",
        ),
        (
            "alter table shop.seats rename column id to number",
            f"shop.seats: its captured column id was dropped or renamed: {COLUMN_GONE}",
        ),
        (
            "alter table shop.seats drop constraint seats_pkey",
            "shop.seats: its key (id) is not unique any more: add a primary key or unique constraint on it",
        ),
        (
            "alter table shop.seats drop constraint seats_pkey, alter column id drop not null,"
            " add constraint seats_id unique (id)",
            "shop.seats: its key column id may be null: set it NOT NULL again",
        ),
        (
            "alter table shop.seats rename column room_id to room",
            "shop.seats: its topic or its rights cannot be worked out (column r.room_id does not exist): "
            + EXPRESSION,
        ),
        (
            "alter table shop.rooms rename column name to title",
            "shop.seats: its topic or its rights cannot be worked out (column m.name does not exist): " + EXPRESSION,
        ),
        (
            "drop table shop.rooms",
            'shop.seats: its topic or its rights cannot be worked out (relation "shop.rooms" does not exist): '
            + EXPRESSION,
        ),
        (
            "create table shop.box_seats (price int) inherits (shop.seats)",
            "shop.seats: what is written to its child shop.box_seats directly is not captured: "
            "alter table shop.box_seats no inherit shop.seats, and call rowcast.watch() for it too",
        ),
        (
            "create table shop.places (label text); alter table shop.seats inherit shop.places",
            "shop.seats: what is written to it through shop.places, from which it inherits, is not captured: "
            "alter table shop.seats no inherit shop.places",
        ),
        (
            """create table shop.floors (like shop.seats) partition by range (id);
               alter table shop.floors attach partition shop.seats default""",
            "shop.seats: it is a partition of shop.floors, and what is written to that is not captured: "
            "alter table shop.floors detach partition shop.seats, or call rowcast.watch() for shop.floors",
        ),
        (
            "alter table shop.seats set unlogged",
            "shop.seats: it is unlogged: a crash of Postgres empties it, and clients hear nothing of that: "
            "alter table shop.seats set logged",
        ),
    ],
)
async def test_a_table_that_is_not_what_watch_was_given_is_reported_with_its_columns(
    shop: Connection, change: str, problem: str
) -> None:
    await shop.execute(change)
    assert [problem] == await problems(shop)


@pytest.mark.parametrize(
    "change",
    [
        "alter table shop.seats drop column unused",
        "alter table shop.seats add column price numeric",
        "alter table shop.seats alter column label type varchar(10)",
        "alter table shop.seats alter column id type bigint",
        "alter table shop.seats add foreign key (room_id) references shop.rooms on delete cascade",
        "alter table shop.seats enable row level security",
        "create index on shop.seats (label)",
    ],
)
async def test_a_change_that_loses_nothing_is_no_problem(shop: Connection, change: str) -> None:
    await shop.execute(change)
    assert [] == await problems(shop)


COLUMN_CHANGED = "the type of its captured column {} has changed: it may be told wrongly, or writes may fail"
KEY_CHANGED = "a foreign key has changed, or its key (id) is deferrable: clients may end on an old version of a row"

UNREADABLE = (
    "rowcast_capture may not read its captured column {}: snapshots fail, and so may writes, or the column is another"
    " one of that name"
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("alter column id type text using id::text", COLUMN_CHANGED.format("id")),
        ("alter column label type json using to_json(label)", COLUMN_CHANGED.format("label")),
        ("alter column label type interval using null", COLUMN_CHANGED.format("label")),
        ("alter column label type shop.pair using null", COLUMN_CHANGED.format("label")),
        ("alter column label type shop.pair[] using null", COLUMN_CHANGED.format("label")),
        ("alter column label type text collate shop.caseless", COLUMN_CHANGED.format("label")),
        ("alter column label type text", ""),
        ("add foreign key (room_id) references shop.rooms on update cascade", KEY_CHANGED),
        ("add foreign key (room_id) references shop.rooms on delete set null", KEY_CHANGED),
        ("drop constraint seats_pkey, add primary key (id) deferrable", KEY_CHANGED),
        ("drop column label, add column label text default 'new'", UNREADABLE.format("label")),
        ("drop column room_id, add column room_id int not null default 1", UNREADABLE.format("room_id")),
    ],
)
async def test_a_table_whose_columns_or_keys_no_longer_suit_its_capture_is_reported_and_applying_again_mends_it(
    shop: Connection, change: str, problem: str
) -> None:
    await shop.execute("create type shop.pair as (a integer, b text)")
    await shop.execute(CASELESS)
    await shop.execute(f"alter table shop.seats {change}")
    if "caseless" in change and await shop.fetchval(DETERMINISTIC):
        problem = ""
    assert ([f"shop.seats: {problem}: {REAPPLY}"] if problem else []) == await problems(shop)
    await shop.execute(APPLY_AGAIN)
    assert [] == await problems(shop)


@pytest.mark.parametrize("table", ["rooms", "seats"])
async def test_row_security_on_a_table_that_capture_reads_is_a_problem_unless_its_role_bypasses_it(
    shop: Connection, table: str
) -> None:
    await shop.execute(f"alter role rowcast_capture nobypassrls; alter table shop.{table} enable row level security")
    assert [f"shop.{table}: {ROW_SECURITY}"] == await problems(shop)
    await shop.execute("alter role rowcast_capture bypassrls")
    assert [] == await problems(shop)


async def test_an_unlogged_table_is_only_a_note(shop: Connection) -> None:
    await shop.execute("alter table shop.seats set unlogged")
    assert [True] == [problem.is_note for problem in await check_captures(shop)]


async def test_a_large_table_that_snapshots_read_as_a_whole_is_only_a_note(shop: Connection) -> None:
    await shop.execute("update pg_class set reltuples = 10000 where oid = 'shop.seats'::regclass")
    [note] = await check_captures(shop)
    assert ("shop.seats", True) == (note.table, note.is_note)


async def test_a_table_that_somebody_locks_delays_no_check(database: str) -> None:
    locker, checker = [await connect(database, application_name="test") for _ in range(2)]
    async with locker.transaction():
        await locker.execute("lock table chatgenius.messages in access exclusive mode")
        assert [] == await check_captures(checker)
    await locker.close()
    await checker.close()


@pytest.fixture
async def subscribed(tables: Connection, postgres: Server) -> AsyncIterator[Connection]:
    """With subscriptions for app.notes and app.fed_1, which are in the catalog but replicate nothing."""
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


async def test_a_subscription_to_a_table_with_statement_triggers_is_reported(subscribed: Connection) -> None:
    assert [
        "app.notes: a subscription writes to app.notes, but replication does not fire statement triggers: "
        "call rowcast.watch() for it again with per_row => true"
    ] == await problems(subscribed)
    await subscribed.execute("select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id}', per_row => true)")
    assert [] == await problems(subscribed)


async def test_a_role_that_may_only_read_the_watched_tables_sees_the_same_problems(subscribed: Connection) -> None:
    await subscribed.execute("create role plain")
    try:
        await subscribed.execute(
            "grant usage on schema rowcast to plain; grant select on rowcast.watched to plain; set role plain"
        )
        assert ["app.notes"] == [problem.table for problem in await check_captures(subscribed)]
    finally:
        await subscribed.execute("reset role; drop owned by plain; drop role plain")


async def test_a_database_without_rowcast_raises_a_database_fault(empty_database: str) -> None:
    connection = await connect(empty_database, application_name="test")
    for check in (check_captures, count_watched):
        with pytest.raises(DatabaseFault):
            await check(connection)
    await connection.close()
