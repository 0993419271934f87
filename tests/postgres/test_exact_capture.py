"""What capture says of a row is what the table says, whatever the row's types and names, its writer, its triggers."""

import json
from collections.abc import AsyncIterator
from functools import partial

import asyncpg
import pytest

from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.support.cases import for_each
from tests.support.postgres import Server, ignore

# In a Postgres without ICU every collation is deterministic.
CASELESS = """
    do $$ begin
        create collation app.caseless (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
    exception when feature_not_supported or invalid_parameter_value or undefined_object then
        create collation app.caseless from "C";
    end $$;
"""

MERGE = """
    merge into app.notes as n using (values (2, 'a'), (3, 'b')) as s (id, room) on n.id = s.id
    when matched then update set room = s.room when not matched then insert values (s.id, s.room)
"""
UPSERT = """
    insert into app.notes values (2, 'a'), (3, 'b') on conflict (id) do update set room = excluded.room
"""

Event = tuple[str, str, str, str | None]  # topic, kind, key, record


@pytest.fixture
async def sql(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with Rowcast's own schema alone; what is done in it is undone."""
    async with postgres.undone("rowcast", partial(migrate.apply, packs=(), report=ignore)) as connection:
        yield connection


@pytest.fixture
async def notes(sql: Connection) -> Connection:
    await sql.execute("""
        create schema app;
        create table app.notes (id integer primary key, room text, body text, gone timestamptz);
        create table app.log (id integer primary key, body text);
        select rowcast.watch('app.notes', 'r.room', '{id,body}', soft_delete => 'gone');
        select rowcast.watch('app.log', $$'log'$$, '{id,body}');
        create function app.censor() returns trigger language plpgsql as $f$
        begin
            update app.notes set body = '***' where id = new.id and body = 'darn';
            return null;
        end $f$;
    """)
    return sql


async def events(sql: Connection) -> list[Event]:
    """The events since the last call, in order."""
    return [
        tuple(row)
        for row in await sql.fetch(
            """with taken as (delete from rowcast.events returning *)
               select topic, kind::text, key::text, record::text from taken order by id"""
        )
    ]


async def seen(sql: Connection) -> dict[tuple[str, str], str | None]:
    """What a client has that applied the events since the last call: a record by topic and key."""
    rows: dict[tuple[str, str], str | None] = {}
    for topic, kind, key, record in await events(sql):
        if kind in {"insert", "update", "restore"}:
            rows[topic, key] = record
        else:
            rows.pop((topic, key), None)
    return rows


async def watched(
    sql: Connection, columns: str, *, published: str = "{id,v}", key: str = "{id}", topic: str = "'t'"
) -> None:
    await sql.execute(f"create schema if not exists app; create table app.t ({columns})")
    await sql.execute(
        "select rowcast.watch('app.t', $1, $2, $3)",
        topic,
        published.strip("{}").split(","),
        key.strip("{}").split(","),
    )


# Triggers that write to the row that fired them.


@for_each(
    "trigger",
    [
        "create trigger moderate after insert or update on app.notes for each row execute function app.censor()",
        "create trigger a after insert or update on app.notes for each row execute function app.censor()",
        "create trigger rowcast_z after insert or update on app.notes for each row execute function app.censor()",
        "create constraint trigger late after insert or update on app.notes deferrable initially deferred"
        " for each row execute function app.censor()",
        """create function app.censor_all() returns trigger language plpgsql as $f$
           begin
               if pg_trigger_depth() = 1 then update app.notes set body = '***' where body = 'darn'; end if;
               return null;
           end $f$;
           create trigger a after insert or update on app.notes execute function app.censor_all()""",
        """select rowcast.watch('app.notes', 'r.room', '{id,body}', soft_delete => 'gone', per_row => true);
           create trigger a after insert or update on app.notes for each row execute function app.censor()""",
    ],
)
async def test_a_row_that_a_trigger_changes_again_ends_as_the_table_has_it(notes: Connection, trigger: str) -> None:
    await notes.execute(trigger)
    await notes.execute("insert into app.notes values (1, 'a', 'darn'), (2, 'a', 'fine')")
    await notes.execute("update app.notes set body = 'darn' where id = 2")
    await notes.execute("set constraints all immediate")
    right = {("a", '{"id":1}'): '{"id":1,"body":"***"}', ("a", '{"id":2}'): '{"id":2,"body":"***"}'}
    assert right == await seen(notes)


async def test_an_array_of_as_many_dimensions_as_arrays_can_have_is_captured(sql: Connection) -> None:
    await sql.execute("""
        create schema app;
        create table app.grids (id integer primary key, cells text[] not null, more text[]);
        select rowcast.watch('app.grids', $$'grids'$$, '{id,cells,more}');
        insert into app.grids
        select n, array_fill(repeat(md5(n::text), n * n), '{2,2,2,2,2,2}'), null from generate_series(1, 9) as n;
        update app.grids set more = cells where id > 7;
    """)
    right = {
        row["key"]: json.loads(row["record"])
        for row in await sql.fetch("""
            select format('{"id":%s}', g.id) as key, row_to_json(g)::text as record from app.grids as g""")
    }
    assert right == {key: json.loads(record or "") for (_, key), record in (await seen(sql)).items()}


async def test_the_content_of_a_row_that_a_trigger_deletes_is_never_sent(notes: Connection) -> None:
    await notes.execute("""
        create function app.refuse() returns trigger language plpgsql as $f$
        begin delete from app.notes where id = new.id and body = 'spam'; return null; end $f$;
        create trigger moderate after insert or update on app.notes for each row execute function app.refuse();
        insert into app.notes values (1, 'a', 'spam'), (2, 'a', 'fine');
    """)
    captured = await events(notes)
    assert "spam" not in str(captured)
    await notes.execute("update app.notes set body = 'spam'")
    captured = await events(notes)
    assert "spam" not in str(captured)
    assert ("delete", '{"id":2}') in [(kind, key) for _, kind, key, _ in captured]


async def test_several_triggers_that_write_to_each_others_tables_end_as_the_tables_are(notes: Connection) -> None:
    await notes.execute("""
        create function app.record() returns trigger language plpgsql as $f$
        begin
            insert into app.log values (new.id, new.body) on conflict (id) do update set body = excluded.body;
            return null;
        end $f$;
        create function app.number() returns trigger language plpgsql as $f$
        begin
            if pg_trigger_depth() < 3 then
                update app.notes set body = new.body || '!', room = 'b' where id = new.id and room = 'a';
                update app.log set body = body || '?' where id <> new.id;
            end if;
            return null;
        end $f$;
        create trigger z after insert or update on app.notes for each row execute function app.record();
        create trigger a after insert or update on app.log for each row execute function app.number();
        insert into app.notes values (1, 'a', 'x'), (2, 'a', 'y');
    """)
    right = {
        (row["topic"], row["key"]): row["record"]
        for row in await notes.fetch("""
            select room as topic, format('{"id":%s}', o.id) as key, row_to_json(n)::text as record
            from (select id, body, room from app.notes) as o cross join lateral (select o.id, o.body) as n
            union all select 'log', format('{"id":%s}', id), row_to_json(l)::text from app.log as l""")
    }
    assert 4 == len(right)
    assert right == await seen(notes)


@for_each(
    "statement",
    [
        "insert into app.notes values (1, 'a', 'first'), (2, 'a', app.touch())",
        "insert into app.notes values (1, 'a', 'first') returning app.touch()",
        "insert into app.notes values (1, 'a', 'first'); update app.notes set body = 'second' returning app.touch()",
        "with w as (insert into app.notes values (1, 'a', 'first') returning app.touch()) select * from w",
    ],
)
async def test_a_function_that_a_statement_calls_may_write_to_the_rows_of_the_statement(
    notes: Connection, statement: str
) -> None:
    await notes.execute("""
        create function app.touch() returns text language plpgsql as $f$
        begin update app.notes set body = 'touched' where id = 1; return 'x'; end $f$
    """)
    await notes.execute(statement)
    assert '{"id":1,"body":"touched"}' == (await seen(notes))["a", '{"id":1}']


async def test_a_row_that_merge_updates_behind_one_that_it_inserts_is_not_taken_for_that_one(sql: Connection) -> None:
    await sql.execute("""
        create schema app;
        create table app.notes (id integer primary key, room text) partition by hash (id);
        create table app.half partition of app.notes for values with (modulus 2, remainder 0);
        create table app.rest partition of app.notes for values with (modulus 2, remainder 1);
        select rowcast.watch('app.notes', 'r.room', '{id}');
        insert into app.notes values (3, 'c');
    """)
    await events(sql)
    has_merge = await sql.fetchval("select current_setting('server_version_num')::int >= 150000")
    await sql.execute(MERGE if has_merge else UPSERT)
    found = {(topic, kind, key) for topic, kind, key, _ in await events(sql)}
    assert found >= {("c", "leave", '{"id":3}'), ("b", "insert", '{"id":3}'), ("a", "insert", '{"id":2}')}


PARTS = """
    create schema app;
    create table app.notes (id integer, room text, primary key (id, room)) partition by list (room);
    create table app.a partition of app.notes for values in ('a');
    create table app.b partition of app.notes for values in ('b');
    create table app.rest partition of app.notes default partition by hash (id);
    create table app.half partition of app.rest for values with (modulus 2, remainder 0);
    create table app.other partition of app.rest for values with (modulus 2, remainder 1);
    create table app.jobs (id integer primary key);
    create table app.moves (id integer);
"""
MOVE = """
    merge into app.notes as n using (values (1)) as s (id) on n.id = s.id when matched then update set room = 'b'
"""
WATCH = "select rowcast.watch('app.notes', 'r.room', '{id}', '{id,room}'"


@pytest.fixture
async def parts(sql: Connection) -> Connection:
    await sql.execute(PARTS)
    return sql


async def has_merge(sql: Connection) -> bool:
    found: bool = await sql.fetchval("select current_setting('server_version_num')::int >= 150000")
    return found


async def test_row_triggers_capture_what_moves_to_another_partition_by_merge(parts: Connection) -> None:
    if not await has_merge(parts):
        return
    await parts.execute(f"{WATCH}, per_row => true); insert into app.notes values (1, 'a')")
    await events(parts)
    await parts.execute(MOVE)
    found = {(topic, kind, key) for topic, kind, key, _ in await events(parts)}
    assert {("a", "delete", '{"id":1,"room":"a"}'), ("b", "insert", '{"id":1,"room":"b"}')} == found


@for_each(
    ("before", "merge"),
    [
        (f"{WATCH})", MOVE),
        (f"{WATCH}, on_error => 'lenient')", MOVE),
        (f"{WATCH})", f"{MOVE} when not matched then insert values (s.id, 'a')"),
        (f"{WATCH})", f"{MOVE.replace('when', 'when matched and n.id = 2 then delete when', 1)}"),
        # Other rows of the statement change where they are.
        (
            f"{WATCH})",
            """merge into app.notes as n using app.notes as s on (n.id, n.room) = (s.id, s.room)
               when matched and n.id > 2 then update set id = n.id + 2, room = n.room
               when matched then update set room = 'b'""",
        ),
        # A part of the table is written to, which has parts itself.
        (
            f"{WATCH}); insert into app.notes values (4, 'c')",
            """merge into app.rest as n using (values (4)) as s (id) on n.id = s.id
               when matched then update set id = 12""",
        ),
        # A trigger of another table, or of this one, or a function in a statement that writes to this one.
        (
            f"""{WATCH});
            create function app.move() returns trigger language plpgsql as $f$ begin {MOVE}; return null; end $f$;
            create trigger move after insert on app.jobs execute function app.move()""",
            "insert into app.jobs values (1)",
        ),
        (
            f"""{WATCH});
            create function app.move() returns trigger language plpgsql as $f$ begin {MOVE}; return null; end $f$;
            create trigger move after update on app.notes for each row
            when (old.id = 3) execute function app.move()""",
            "update app.notes set id = 5 where id = 3",
        ),
        (
            f"""{WATCH});
            create function app.move() returns integer language plpgsql as $f$ begin {MOVE}; return 5; end $f$""",
            "update app.notes set id = app.move() where id = 3",
        ),
        # A trigger decides, behind the one of capture in the alphabet.
        (
            f"""{WATCH});
            create function app.decide() returns trigger language plpgsql as $f$
            begin new.room := 'b'; return new; end $f$;
            create trigger zz before update on app.notes for each row execute function app.decide()""",
            MOVE.replace("room = 'b'", "room = 'a'"),
        ),
        (
            f"""alter table app.notes drop constraint notes_pkey;
            alter table app.notes add primary key (id, room) deferrable initially deferred;
            {WATCH})""",
            MOVE,
        ),
        # A part that came later.
        (
            f"""{WATCH}); create table app.late (room text not null, id integer not null);
            alter table app.notes attach partition app.late for values in ('z');
            insert into app.notes values (7, 'z')""",
            MOVE.replace("values (1)", "values (7)"),
        ),
    ],
)
async def test_what_a_merge_moves_to_another_partition_resets_who_follows_the_table(
    parts: Connection, before: str, merge: str
) -> None:
    if not await has_merge(parts):
        return
    await parts.execute(f"{before}; insert into app.notes values (1, 'a'), (2, 'b'), (3, 'b')")
    await events(parts)
    await parts.execute(merge)
    assert 1 == [kind for _, kind, _, _ in await events(parts)].count("lost")
    await parts.execute("update app.notes set id = 9 where id = 2")
    assert "lost" not in {kind for _, kind, _, _ in await events(parts)}


@for_each(
    ("before", "update", "moves"),
    [
        ("select 1", "update app.notes set room = 'b' where id = 1", {("1a", "1b")}),
        ("select 1", "update app.notes set room = 'c'", {("1a", "1c"), ("2b", "2c"), ("3b", "3c")}),
        # A row takes the place of another one, which stays or moves on.
        ("select 1", "update app.notes set id = 4 - id where id <> 2 and room = 'b'", {("3b", "1b")}),
        (
            "alter table app.notes drop constraint notes_pkey; alter table app.notes add primary key (id, room) "
            "deferrable initially deferred; insert into app.notes values (1, 'b')",
            "update app.notes set room = chr(ascii(room) + 1) where id = 1",
            {("1a", ""), ("", "1c")},
        ),
        # A trigger writes to the table while rows move.
        (
            """create function app.also() returns trigger language plpgsql as $f$
               begin update app.notes set id = 8 where id = 3; return null; end $f$;
               create trigger also after delete on app.notes for each row execute function app.also()""",
            "update app.notes set room = 'b' where id = 1",
            {("1a", "1b"), ("3b", "8b")},
        ),
        (
            """create function app.also() returns trigger language plpgsql as $f$
               begin update app.notes set room = 'c' where id = 3; return new; end $f$;
               create trigger also before update on app.notes for each row
               when (old.id = 1) execute function app.also()""",
            "update app.notes set room = 'b' where id = 1",
            {("1a", "1b"), ("3b", "3c")},
        ),
        (
            "select 1",
            "insert into app.notes values (1, 'a') on conflict (id, room) do update set id = 5",
            {("1a", "5a")},
        ),
        ("select 1", "savepoint s; update app.notes set room = 'b'; rollback to s", {}),
    ],
)
async def test_a_row_that_an_update_moves_to_another_partition_is_sent_once_and_nobody_is_reset(
    parts: Connection, before: str, update: str, moves: set[tuple[str, str]]
) -> None:
    await parts.execute(f"{WATCH}); insert into app.notes values (1, 'a'), (2, 'b'), (3, 'b'); {before}")
    await events(parts)
    await parts.execute(update)
    sent = sorted(
        (kind, f"{row['id']}{row['room']}") for _, kind, key, _ in await events(parts) for row in [json.loads(key)]
    )
    right = [("delete", old) for old, _ in moves if old] + [("insert", new) for _, new in moves if new]
    assert sorted(right) == sent


async def test_a_merge_that_moves_nothing_to_another_partition_resets_nobody(parts: Connection) -> None:
    if not await has_merge(parts):
        return
    await parts.execute(f"{WATCH}); insert into app.notes values (1, 'a'), (2, 'b'), (3, 'b')")
    await events(parts)
    await parts.execute("""
        merge into app.notes as n using app.notes as s on (n.id, n.room) = (s.id, s.room)
        when matched and n.id = 3 then delete when matched then update set id = n.id + 10
    """)
    assert {"delete", "insert"} == {kind for _, kind, _, _ in await events(parts)}


async def test_nothing_of_capture_stays_at_a_partitioned_table_that_is_unwatched(parts: Connection) -> None:
    await parts.execute(f"{WATCH})")
    await parts.execute("select rowcast.unwatch('app.notes')")
    assert 0 == await parts.fetchval("select count(*) from pg_trigger where tgname like '%rowcast%'")


async def test_a_row_that_a_rule_on_a_foreign_key_updates_again_ends_as_the_table_has_it(sql: Connection) -> None:
    await sql.execute("""
        create schema app;
        create table app.notes (id integer primary key, body text);
        create table app.replies (id integer primary key, note integer references app.notes on update cascade);
        create rule touch as on update to app.replies do also
            update app.notes set body = 'answered' where id = new.note;
        select rowcast.watch('app.notes', $$'notes'$$, '{id,body}');
        insert into app.notes values (1, 'answered'), (2, 'two');
        insert into app.replies values (1, 1);
    """)
    await events(sql)
    await sql.execute("update app.notes set id = id + 10")
    rows = {key: record for (_, key), record in (await seen(sql)).items()}
    assert {
        '{"id":11}': '{"id":11,"body":"answered"}',
        '{"id":12}': '{"id":12,"body":"two"}',
    } == rows


@pytest.mark.parametrize("published", ["{id,body}", "{id,parent}"])
async def test_rows_of_a_tree_whose_keys_change_together_end_as_the_table_has_them(
    sql: Connection, published: str
) -> None:
    await sql.execute("""
        create schema app;
        create table app.tree (
            id integer primary key, parent integer references app.tree on update cascade, body text
        );
        insert into app.tree values (1, null, 'root'), (2, 1, 'branch'), (3, 2, 'leaf');
    """)
    await sql.execute("select rowcast.watch('app.tree', $$'tree'$$, $1::text::text[])", published)
    await sql.execute("update app.tree set id = id + 10")
    columns = published.strip("{}")
    right = await sql.fetch(f"select row_to_json(t)::text as record from (select {columns} from app.tree) as t")
    assert {row["record"] for row in right} == set((await seen(sql)).values())


async def test_a_row_that_moves_on_in_a_trigger_leaves_every_topic_it_was_in(notes: Connection) -> None:
    await notes.execute("insert into app.notes values (1, 'a', 'x')")
    await notes.execute("""
        create function app.move_on() returns trigger language plpgsql as $f$
        begin update app.notes set room = 'c' where id = new.id and room = 'b'; return null; end $f$;
        create trigger z after update on app.notes for each row execute function app.move_on();
        update app.notes set room = 'b';
    """)
    assert {("c", '{"id":1}'): '{"id":1,"body":"x"}'} == await seen(notes)


async def test_a_row_that_a_trigger_soft_deletes_is_deleted_without_content(notes: Connection) -> None:
    await notes.execute("""
        create function app.hide() returns trigger language plpgsql as $f$
        begin update app.notes set gone = now() where id = new.id and gone is null; return null; end $f$;
        create trigger z after insert on app.notes for each row execute function app.hide();
        insert into app.notes values (1, 'a', 'secret');
    """)
    assert "secret" not in str(await events(notes))


# Names.

NAMES = (
    "x", "k", "r", "o", "n", "t", "g", "e", "c", "new", "old", "key", "topic", "kind", "record", "found", "tg_op",
    "step", "live", "rights", "topics", "command", "again", "sets", "gives", "select", "$1", "%s",
    "%1$s", "$capture$", "$$", "a.b", 'a"b', "it's", "\\", " ", "é🙂", "x" * 63,
)  # fmt: skip


@for_each("name", NAMES)
async def test_no_name_of_a_column_matters(sql: Connection, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    await sql.execute(f"create schema app; create table app.t (id integer primary key, {quoted} text)")
    await sql.execute("select rowcast.watch('app.t', $1, $2)", quoted, ["id", name])
    await sql.execute("insert into app.t values (1, 'a'), (2, 'b')")
    await sql.execute(f"update app.t set {quoted} = 'c' where id = 1")
    await sql.execute("delete from app.t where id = 2")
    assert {("c", '{"id":1}')} == set(rows := await seen(sql))
    assert {"id": 1, name: "c"} == json.loads(rows["c", '{"id":1}'] or "")


@for_each("name", NAMES)
async def test_an_unpublished_column_is_never_published_whatever_its_name(sql: Connection, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    await sql.execute(f"""
        create schema app; create type app.both as (a text, b text);
        create table app.t (id integer primary key, v text, {quoted} app.both)
    """)
    await sql.execute("select rowcast.watch('app.t', $1, '{id,v}')", "'t'")
    await sql.execute("insert into app.t values (1, 'a', '(secret,secret)')")
    await sql.execute(f"update app.t set v = 'b', {quoted} = '(secret,other)'")
    captured = await events(sql)
    assert ['{"id":1,"v":"a"}', '{"id":1,"v":"b"}'] == [record for *_, record in captured]
    await sql.execute("delete from app.t")
    assert [("t", "delete", '{"id":1}', None)] == await events(sql)


# The writer's session.

SETTINGS = (
    "set extra_float_digits = -15", "set bytea_output = 'escape'", "set intervalstyle = 'iso_8601'",
    "set intervalstyle = 'sql_standard'", "set datestyle = 'SQL, DMY'", "set datestyle = 'German'",
    "set timezone = 'Asia/Kolkata'", "set quote_all_identifiers = on", "set lc_monetary = 'C.UTF-8'",
    "set standard_conforming_strings = off", "set search_path = public", "set xmloption = 'document'",
    "set transform_null_equals = on", "set array_nulls = off", "set row_security = off",
)  # fmt: skip


@for_each("setting", SETTINGS)
async def test_what_a_row_says_does_not_depend_on_the_writers_settings(sql: Connection, setting: str) -> None:
    await sql.execute("""
        create schema app;
        create type app.pair as (f float8, b bytea);
        create table app.t (id bytea primary key, f float8, p point, b bytea[], i interval, d daterange, z tstzrange,
                            c regclass, m money, pair app.pair, n float8);
    """)
    topic = r"'back\slash:' || r.f::text || r.i::text"
    await sql.execute("select rowcast.watch('app.t', $1, '{id,f,p,b,i,d,z,c,m,pair}')", topic)
    # Written with functions, since a setting may change what a literal means.
    row = """(
        decode('61ff', 'hex'), 0.1::float8 + 0.2, point(0.1, 0.1::float8 + 0.2), array[decode('61ff', 'hex')],
        make_interval(years => 1, days => -2, secs => 5.5), daterange('2024-01-02', '2024-03-04'),
        tstzrange('2024-01-02 03:04+00', null), 'app.t', 1.5, row(0.1::float8 + 0.2, decode('ff', 'hex')), 1
    )"""
    await sql.execute(f"insert into app.t values {row}")
    [plain] = await events(sql)
    await sql.execute("delete from app.t")
    await events(sql)
    await sql.execute(f"{setting}; insert into app.t values {row}")
    await sql.execute("update app.t set n = 2, m = 2.5")
    await sql.execute("update app.t set m = 1.5")
    await sql.execute("delete from app.t")
    [inserted, changed, restored, deleted] = await events(sql)
    assert plain == inserted
    assert plain[0] == changed[0]
    assert (plain[0], plain[2], plain[3]) == (restored[0], restored[2], restored[3])
    assert (plain[0], "delete", plain[2]) == deleted[:3]


# What reads differently is an update, even if the type says that it is equal.


@for_each(
    ("type_", "before", "after"),
    [
        ("box", "(1,1),(0,0)", "(3,3),(2,2)"),
        ("circle", "<(0,0),1>", "<(5,5),1>"),
        ("path", "((0,0),(1,1))", "((0,0),(2,2))"),
        ("lseg", "[(0,0),(1,1)]", "[(1,1),(0,0)]"),
        ("box[]", "{(1,1),(0,0)}", "{(3,3),(2,2)}"),
        ("interval", "1 day", "24:00:00"),
        ("interval[]", '{"1 day"}', '{24:00:00}'),
        ("numeric", "1.0", "1.00"),
        ("numrange", "[1.0,2)", "[1.00,2)"),
        ("float8", "0", "-0"),
        ("jsonb", '{"a": 1.0}', '{"a": 1.00}'),
        ("bpchar", "a", "a  "),
        ("app.exact", "1.0", "1.00"),
        ("app.pair", "(1.0,a)", "(1.00,a)"),
        ("app.pair[]", '{"(1.0,a)"}', '{"(1.00,a)"}'),
        ("text collate app.caseless", "a", "A"),
        ("name collate app.caseless", "a", "A"),
        ("json", '{"a": 1}', '{"a":1}'),
        ("json[]", '{"1"}', '{"2"}'),
        ("xml", "<a/>", "<a></a>"),
        ("xml[]", "{<a/>}", "{<b/>}"),
        ("point", "(1,2)", "(1,2.0000001)"),
        ("point[]", '{"(1,2)"}', '{"(1,3)"}'),
        ("polygon[]", '{"((0,0),(1,1))"}', '{"((0,0),(2,2))"}'),
        ("jsonpath", "$.a", "$.b"),
        ("jsonpath[]", "{$.a}", "{$.b}"),
        ("aclitem[]", "{=r/rowcast_capture}", "{=w/rowcast_capture}"),
        ("xid", "1", "2"),
        ("cid", "1", "2"),
        ("txid_snapshot", "1:1:", "1:2:"),
    ],
)  # fmt: skip
async def test_a_value_that_reads_differently_is_an_update(
    sql: Connection, type_: str, before: str, after: str
) -> None:
    await sql.execute(f"""
        create schema app;
        create domain app.exact as numeric;
        create type app.pair as (n numeric, t text);
        {CASELESS}
    """)
    await watched(sql, f"id integer primary key, v {type_}")
    await sql.execute(f"insert into app.t values (1, '{before}')")
    [(*_, old)] = await events(sql)
    await sql.execute(f"update app.t set v = '{after}'")
    [(topic, kind, key, new)] = await events(sql)
    assert ("t", "update", '{"id":1}') == (topic, kind, key)
    assert old != new
    await sql.execute("update app.t set v = v")
    assert [] == await events(sql)


@for_each(
    ("type_", "before", "after"),
    [
        ("numeric", "1.0", "1.00"),
        ("interval", "1 day", "24:00:00"),
        ("float8", "0", "-0"),
        ("bpchar", "a", "a  "),
        ("jsonb", '{"a": 1.0}', '{"a": 1.00}'),
        ("text collate app.caseless", "a", "A"),
        ("name collate app.caseless", "a", "A"),
        ("numrange", "[1.0,2)", "[1.00,2)"),
        ("app.pair", "(1.0,a)", "(1.00,a)"),
    ],
)  # fmt: skip
async def test_a_key_that_reads_differently_is_another_key(
    sql: Connection, type_: str, before: str, after: str
) -> None:
    await sql.execute(f"""
        create schema app;
        create type app.pair as (n numeric, t text);
        {CASELESS}
    """)
    await watched(sql, f"id {type_} primary key, v text")
    await sql.execute(f"insert into app.t values ('{before}', 'x')")
    [(_, _, old, _)] = await events(sql)
    await sql.execute(f"update app.t set id = '{after}'")
    captured = await events(sql)
    assert {("t", "delete", old)} == {event[:3] for event in captured if event[1] == "delete"}
    [new] = [key for _, kind, key, _ in captured if kind == "insert"]
    assert new != old
    await sql.execute("delete from app.t")
    assert [("t", "delete", new, None)] == await events(sql)


# Rows that another role, or another table, decides about.


async def test_a_topic_that_reads_a_table_with_row_security_is_captured_or_the_writer_learns_why(
    database: str,
) -> None:
    sql = await asyncpg.connect(database, statement_cache_size=0)
    message = await sql.fetchval("""
        with u as (insert into chatgenius.users (auth0_id, email, username) values ('u', 'u@x', 'u') returning id),
             c as (insert into chatgenius.channels (name) values ('c') returning id)
        insert into chatgenius.messages (channel_id, user_id, content) select c.id, u.id, 'x' from c, u returning id
    """)
    await sql.execute("alter table chatgenius.messages enable row level security; delete from rowcast.events")
    try:
        await sql.execute(
            "insert into chatgenius.reactions (message_id, user_id, emoji)"
            " select id, user_id, 'x' from chatgenius.messages"
        )
    except asyncpg.PostgresError as error:
        assert "row" in str(error) and "security" in str(error)
    else:
        channel = await sql.fetchval("select channel_id from chatgenius.messages where id = $1", message)
        assert [(f"channel:{channel}", "insert")] == [event[:2] for event in await events(sql)]
    finally:
        await sql.close()


async def test_row_security_on_a_watched_table_hides_nothing_from_capture(notes: Connection) -> None:
    await notes.execute("""
        create role writer_of_notes;
        grant usage on schema app to writer_of_notes;
        grant all on app.notes, app.log to writer_of_notes;
        alter table app.notes enable row level security;
        alter table app.notes force row level security;
        create policy all_notes on app.notes to writer_of_notes using (true);
        create trigger moderate after insert on app.notes for each row execute function app.censor();
        set role writer_of_notes;
    """)
    await notes.execute("insert into app.notes values (1, 'a', 'darn')")
    await notes.execute("reset role")
    assert {("a", '{"id":1}'): '{"id":1,"body":"***"}'} == await seen(notes)


async def test_the_rows_of_an_inheritance_child_are_captured_or_the_parent_is_refused(sql: Connection) -> None:
    await sql.execute("""
        create schema app;
        create table app.t (id integer primary key, v text);
        create table app.child (primary key (id)) inherits (app.t);
    """)
    try:
        async with sql.transaction():
            await sql.execute("select rowcast.watch('app.t', $1, '{id,v}')", "'t'")
    except asyncpg.PostgresError as error:
        assert str(error).startswith("rowcast: ") and "inherit" in str(error)
    else:
        await sql.execute("insert into app.child values (1, 'x'); update app.child set v = 'y'")
        await sql.execute("insert into app.t values (2, 'z'); delete from app.t where id = 2")
        assert {("t", '{"id":1}'): '{"id":1,"v":"y"}'} == await seen(sql)


async def test_a_topic_that_reads_what_capture_may_not_read_is_refused_or_works(sql: Connection) -> None:
    await sql.execute("""
        create schema app;
        create table app.rooms (id integer primary key, name text);
        create table app.t (id integer primary key, room integer, v text);
        insert into app.rooms values (1, 'a');
    """)
    topic = "(select m.name from app.rooms as m where m.id = r.room)"
    try:
        async with sql.transaction():
            await sql.execute("select rowcast.watch('app.t', $1, '{id,v}')", topic)
    except asyncpg.PostgresError as error:
        assert str(error).startswith("rowcast: ")
        assert "rooms" in str(error)
    else:
        await sql.execute("insert into app.t values (1, 1, 'x')")
        assert [("a", "insert")] == [event[:2] for event in await events(sql)]


# The code of others.


@for_each(
    "type_",
    ["app.e", "app.c", "app.e[]", "app.c[]", "app.de", "app.dc", "app.nested", "app.de[]", "app.many"],
)
async def test_no_code_of_a_types_owner_runs_when_its_values_are_captured(sql: Connection, type_: str) -> None:
    await sql.execute("""
        create schema app;
        create table app.runs (by_user name);
        grant usage on schema app to public;
        grant insert on app.runs to public;
        create type app.e as enum ('x', 'y');
        create type app.c as (a text, b integer);
        create domain app.de as app.e;
        create domain app.dc as app.c;
        create type app.nested as (c app.c, e app.e);
        create type app.many as range (subtype = app.c);
    """)
    for owned in ("app.e", "app.c", "app.nested", "app.many"):
        for target, result in (("json", "'\"run\"'"), ("text", "'run'"), ("jsonb", "'\"run\"'")):
            name = f"app.{owned.removeprefix('app.')}_to_{target}"
            await sql.execute(f"""
                create function {name}({owned}) returns {target} language plpgsql as
                    $f$ begin insert into app.runs values (current_user); return {result}; end $f$;
                create cast ({owned} as {target}) with function {name}({owned});
            """)
    values = {"app.e": ("x", "y"), "app.de": ("x", "y"), "app.c": ("(a,1)", "(b,2)"),
              "app.dc": ("(a,1)", "(b,2)"),
              "app.nested": ('("(a,1)",x)', '("(b,2)",y)'), "app.many": ('["(a,1)","(a,2)"]', "empty"),
              "app.e[]": ("{x}", "{y}"), "app.de[]": ("{x}", "{y}"),
              "app.c[]": ('{"(a,1)"}', '{"(b,2)"}')}  # fmt: skip
    old, new = values[type_]
    await watched(sql, f"id integer primary key, v {type_}")
    await sql.execute(f"insert into app.t values (1, '{old}'), (2, null)")
    await sql.execute(f"update app.t set v = '{new}' where id = 1")
    await sql.execute("delete from app.t where id = 2")
    captured = await events(sql)
    assert [] == await sql.fetch("select * from app.runs")
    assert ["insert", "insert", "update", "delete"] == [kind for _, kind, _, _ in captured]
    assert "run" not in str(captured)
    assert None is json.loads(captured[1][3] or "")["v"]
    if type_ in {"app.e", "app.de", "app.c", "app.dc", "app.nested", "app.many"}:
        assert [old, new] == [json.loads(captured[place][3] or "")["v"] for place in (0, 2)]


async def test_the_same_row_is_sent_if_a_function_or_an_operator_of_capture_is_shadowed(notes: Connection) -> None:
    await notes.execute("""
        create schema evil;
        create function evil.format(text, variadic "any") returns text language internal as 'text_format';
        create function evil.differ(text, text) returns boolean language sql immutable as 'select 1 / 0 = 1';
        create operator evil.<> (leftarg = text, rightarg = text, function = evil.differ);
        create operator evil.= (leftarg = text, rightarg = text, function = evil.differ);
        create function evil.row_to_json(anyelement) returns json language sql as 'select (1 / 0)::text::json';
        set search_path = evil, pg_catalog;
        insert into app.notes values (1, 'a', 'x');
        update app.notes set body = 'y';
    """)
    assert {("a", '{"id":1}'): '{"id":1,"body":"y"}'} == await seen(notes)
