"""rowcast.watch() is tried on an empty copy of each watched table."""

from collections.abc import AsyncIterator

import pytest

from daemon.postgres.connect import Connection, connect
from daemon.schema import migrate
from daemon.schema.scratch import Scratch, built
from daemon.schema.trial import try_captures
from tests.support.cases import for_each
from tests.support.postgres import ignore

TABLES = """
create schema app;
create type app.pair as (a int, b int);
create table app.notes (id integer primary key, room text, body text, amount integer);
select rowcast.watch('app.notes', $$'room:' || r.room$$, '{id, body, amount}');
create table app."Odd Name" (id integer primary key, "Room" text);
select rowcast.watch('app."Odd Name"', $$'room:' || r."Room"$$, '{id}', per_row => true, on_error => 'lenient');
create table app.kinds (id integer primary key, unique (id));
create table app.parts (
    id integer primary key, kind integer references app.kinds on update cascade,
    "Parent" integer references app.parts on delete set null deferrable initially deferred
);
select rowcast.watch('app.parts', $$'parts'$$, '{id, kind}');
create table app.days (id integer primary key) partition by range (id);
create table app.days_1 partition of app.days for values from (0) to (10);
select rowcast.watch('app.days', $$'days'$$, '{id}');
"""
DIFFERENTLY = "rowcast.watch() would capture it differently today: run `daemon --apply-ddl`"
MEND = "mend that, or call rowcast.watch() for it as it is now"


@pytest.fixture
async def sql(empty_database: str) -> AsyncIterator[Connection]:
    await migrate.apply(empty_database, [], report=ignore)
    connection = await connect(empty_database, application_name="check", server_settings=migrate.SESSION)
    await connection.execute(TABLES)
    yield connection
    await connection.close()


@pytest.fixture
async def scratch(sql: Connection) -> AsyncIterator[Scratch]:
    async with built(sql, migrate.histories_of([], {}, None)) as scratch:
        yield scratch


@for_each(
    ("change", "found"),
    [
        ("select 1", []),
        ("alter table app.notes alter column amount type bigint", []),
        (
            "alter table app.parts drop column kind",
            [f"app.parts: rowcast.watch() would refuse it (rowcast: app.parts has no column kind): {MEND}"],
        ),
        ("alter table app.notes alter column body type json using null", [f"app.notes: {DIFFERENTLY}"]),
        ("alter table app.notes alter column amount type app.pair using null", [f"app.notes: {DIFFERENTLY}"]),
        (
            "alter table app.notes drop column body",
            [f"app.notes: rowcast.watch() would refuse it (rowcast: app.notes has no column body): {MEND}"],
        ),
        (
            "alter table app.notes drop constraint notes_pkey",
            [
                "app.notes: rowcast.watch() would refuse it (rowcast: (id) is no key of app.notes: it must be unique "
                f"and not null): {MEND}"
            ],
        ),
        (
            'alter table app."Odd Name" drop column "Room"',
            [f'app."Odd Name": rowcast.watch() would refuse it (column r.Room does not exist): {MEND}'],
        ),
        (
            "alter table app.notes alter column room type int using null",
            [],
        ),
        (
            "alter table app.notes alter column room type int[] using null",
            [
                'app.notes: rowcast.watch() would refuse it (malformed array literal: "..."): ' + MEND,
            ],
        ),
    ],
)
async def test_what_watch_would_refuse_or_do_otherwise_is_reported(
    sql: Connection, scratch: Scratch, change: str, found: list[str]
) -> None:
    await sql.execute(change)
    assert found == [str(problem) for problem in await try_captures(scratch, ())]
