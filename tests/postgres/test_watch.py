"""rowcast.watch(), tested through the events that its triggers write."""

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import asyncpg
import pytest

from daemon.postgres.connect import Connection, connect
from daemon.schema import migrate
from tests.support.cases import for_each
from tests.support.postgres import Server, ignore

NOTES = """
create schema app;
create table app.notes (
    id integer primary key, room text, body text, secret text, extra json, deleted_at timestamptz
);
create table app.topics (id integer primary key, topic text);
"""
WATCH_NOTES = """
select rowcast.watch('app.notes', topic => $$'room:' || r.room$$, columns => '{id,room,body,extra}',
                     soft_delete => 'deleted_at', revokes => $$jsonb_build_object('topic', 'room:' || r.room)$$)
"""


@pytest.fixture
async def sql(postgres: Server) -> AsyncIterator[Connection]:
    """A session in a database with Rowcast's own schema alone; what is done in it is undone."""
    async with postgres.undone("rowcast", partial(migrate.apply, packs=(), report=ignore)) as connection:
        yield connection


@pytest.fixture
async def notes(sql: Connection) -> Connection:
    await sql.execute(NOTES)
    await sql.execute(WATCH_NOTES)
    return sql


async def events(sql: Connection) -> list[tuple[str, str, int | None]]:
    """Topic, kind and id of each event captured since the last call, in order."""
    rows = await sql.fetch("with taken as (delete from rowcast.events returning *) select * from taken order by id")
    return [(row["topic"], row["kind"], json.loads(row["key"]).get("id")) for row in rows]


async def event(sql: Connection) -> Any:
    [row] = await sql.fetch("with taken as (delete from rowcast.events returning *) select * from taken")
    return row


async def test_an_insert_an_update_and_a_delete_are_one_event_each(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    await notes.execute("update app.notes set body = 'x'")
    await notes.execute("delete from app.notes")
    assert [("room:a", "insert", 1), ("room:a", "update", 1), ("room:a", "delete", 1)] == await events(notes)


async def test_only_the_named_columns_leave_the_table(notes: Connection) -> None:
    await notes.execute(
        "insert into app.notes (id, room, body, secret, extra) values (1, 'a', 'x', 's', '{\"n\": 1}')"
    )
    assert {"id": 1, "room": "a", "body": "x", "extra": {"n": 1}} == json.loads((await event(notes))["record"])


async def test_a_column_that_is_added_later_is_not_published(notes: Connection) -> None:
    await notes.execute("alter table app.notes add column password text default 'p'")
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    assert {"id", "room", "body", "extra"} == set(json.loads((await event(notes))["record"]))


async def test_an_update_names_the_published_columns_that_changed(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room, body, extra) values (1, 'a', 'x', '1')")
    await event(notes)
    await notes.execute("update app.notes set body = 'y', secret = 's', extra = '2'")
    assert ["body", "extra"] == (await event(notes))["changed"]


async def test_an_update_of_unpublished_columns_is_silent(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    await events(notes)
    await notes.execute("update app.notes set secret = 's', body = body")
    assert [] == await events(notes)


async def test_a_soft_delete_is_a_delete_without_content_and_carries_the_right_that_ends(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room, body) values (1, 'a', 'x')")
    await events(notes)
    await notes.execute("update app.notes set deleted_at = now(), body = 'last words'")
    deleted = await event(notes)
    assert ("delete", None, {"topic": "room:a"}) == (
        deleted["kind"],
        deleted["record"],
        json.loads(deleted["revokes"]),
    )


async def test_a_soft_deleted_row_is_silent_until_it_is_restored(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room, deleted_at) values (1, 'a', now()), (2, 'a', now())")
    await notes.execute("update app.notes set body = 'x'")
    await notes.execute("delete from app.notes where id = 2")
    assert [] == await events(notes)
    await notes.execute("update app.notes set deleted_at = null")
    restored = await event(notes)
    assert ("restore", "x") == (restored["kind"], json.loads(restored["record"])["body"])


async def test_a_row_that_moves_leaves_one_topic_and_enters_the_other(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    await events(notes)
    await notes.execute("update app.notes set room = 'b'")
    assert [("room:a", "leave", 1), ("room:b", "insert", 1)] == await events(notes)


async def test_a_row_without_a_topic_is_not_captured(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id) values (1)")
    assert [] == await events(notes)
    await notes.execute("update app.notes set room = 'a'")
    assert [("room:a", "insert", 1)] == await events(notes)
    await notes.execute("update app.notes set room = null")
    assert [("room:a", "leave", 1)] == await events(notes)


async def test_a_changed_key_is_a_delete_and_an_insert(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    await events(notes)
    await notes.execute("update app.notes set id = 2")
    assert [("room:a", "delete", 1), ("room:a", "insert", 2)] == sorted(await events(notes))


async def test_swapped_keys_are_updates_of_both_rows(sql: Connection) -> None:
    await sql.execute("create schema app; create table app.t (id integer unique deferrable not null, v text)")
    await sql.execute("select rowcast.watch('app.t', $$'t'$$, '{id,v}')")
    await sql.execute("insert into app.t values (1, 'one'), (2, 'two')")
    await events(sql)
    await sql.execute("update app.t set id = 3 - id")
    assert [("t", "update", 1), ("t", "update", 2)] == sorted(await events(sql))


async def test_a_statement_over_many_rows_captures_each_of_them(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room) select n, 'a' from generate_series(1, 10000) as n")
    await events(notes)
    await notes.execute("update app.notes set body = 'x'")
    captured = await events(notes)
    assert (10_000, {"update"}) == (len(captured), {kind for _, kind, _ in captured})


async def test_expressions_may_omit_the_row_alias(sql: Connection) -> None:
    await sql.execute(NOTES)
    await sql.execute(
        "select rowcast.watch('app.notes', topic => $$'room:' || room$$, columns => '{id,room,body}',"
        " revokes => $$jsonb_build_object('topic', 'room:' || room)$$)"
    )
    await sql.execute("insert into app.notes (id, room) values (1, 'a')")
    await sql.execute("update app.notes set room = 'b'")
    await sql.execute("delete from app.notes")
    assert [("room:a", "insert", 1), ("room:a", "leave", 1), ("room:b", "insert", 1), ("room:b", "delete", 1)] == (
        await events(sql)
    )


async def test_a_truncate_is_one_event_for_the_whole_pack(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    await events(notes)
    await notes.execute("truncate app.notes")
    assert [("*app", "truncate", None)] == await events(notes)


async def test_a_topic_expression_may_give_several_topics(sql: Connection) -> None:
    await sql.execute("create schema app; create table app.t (id integer primary key, rooms text[])")
    await sql.execute("select rowcast.watch('app.t', 'r.rooms', '{id}')")
    await sql.execute("insert into app.t values (1, '{a,b,b,null}')")
    assert [("a", "insert", 1), ("b", "insert", 1)] == await events(sql)
    await sql.execute("update app.t set rooms = '{b,c}'")
    assert [("a", "leave", 1), ("c", "insert", 1)] == await events(sql)
    await sql.execute("delete from app.t")
    assert [("b", "delete", 1), ("c", "delete", 1)] == await events(sql)


async def test_a_row_may_be_in_any_number_of_topics(sql: Connection) -> None:
    await sql.execute("create schema app; create table app.t (id integer primary key, first integer, v text)")
    topics = "array(select 'user:' || u from generate_series(r.first, r.first + 2999) as u)"
    await sql.execute("select rowcast.watch('app.t', $1, '{id,v}')", topics)
    await sql.execute("insert into app.t values (1, 0, 'a')")
    await sql.execute("truncate rowcast.events")
    await sql.execute("update app.t set v = 'b'")
    await sql.execute("update app.t set first = 2000")
    found = await sql.fetch(
        "select kind::text, count(*) as n, count(distinct topic) as topics from rowcast.events group by 1"
    )
    assert {("update", 3000, 3000), ("leave", 2000, 2000), ("insert", 2000, 2000)} == {tuple(row) for row in found}


async def test_writes_that_name_a_partition_are_captured_as_the_whole_table(sql: Connection) -> None:
    await sql.execute("""
        create schema app;
        create table app.t (id integer primary key, v text) partition by range (id);
        create table app.t1 partition of app.t for values from (0) to (10);
        create table app.t2 partition of app.t for values from (10) to (20);
        select rowcast.watch('app.t', $$'t'$$, '{id,v}');
    """)
    await sql.execute("insert into app.t values (1, 'x'), (11, 'x')")
    await sql.execute("update app.t1 set v = 'y'")
    await sql.execute("update app.t set id = 12 where id = 1")
    await sql.execute("delete from app.t2")
    assert [
        ("t", "insert", 1),
        ("t", "insert", 11),
        ("t", "update", 1),
        ("t", "delete", 1),
        ("t", "insert", 12),
        ("t", "delete", 11),
        ("t", "delete", 12),
    ] == await events(sql)
    assert {"t"} == {
        row["table_name"] for row in await sql.fetch("select table_name from rowcast.watched where pack = 'app'")
    }


@pytest.mark.parametrize("per_row", [False, True])
async def test_what_is_written_to_a_partition_that_was_detached_is_sent_to_nobody(
    sql: Connection, per_row: bool
) -> None:
    await sql.execute("""
        create schema app;
        create schema archive;
        create table app.t (id integer primary key, v text) partition by range (id);
        create table archive.t partition of app.t for values from (0) to (10);
        create table app.t2 partition of app.t for values from (10) to (20) partition by range (id);
        create table app.t3 partition of app.t2 for values from (10) to (20);
    """)
    await sql.execute("select rowcast.watch('app.t', $$'t'$$, '{id,v}', per_row => $1)", per_row)
    writes = ("insert into {0} values ({1}, 'x')", "update {0} set v = 'y'", "delete from {0}")
    for statement in writes:
        await sql.execute(statement.format("archive.t", 1))
        await sql.execute(statement.format("app.t3", 11))
    kinds = ("insert", "update", "delete")
    assert [("t", kind, key) for kind in kinds for key in (1, 11)] == await events(sql)
    await sql.execute("alter table app.t detach partition archive.t; alter table app.t detach partition app.t2")
    for statement in (*writes, *(() if per_row else ("truncate {0}",))):
        await sql.execute(statement.format("archive.t", 1))
        await sql.execute(statement.format("app.t3", 11))
    assert [] == await events(sql)


@pytest.mark.parametrize("per_row", [False, True])
async def test_a_session_that_has_captured_before_takes_columns_as_they_are_now(
    sql: Connection, per_row: bool
) -> None:
    await sql.execute("create schema app; create table app.t (id integer primary key, a integer, b integer)")
    await sql.execute("select rowcast.watch('app.t', $$'t'$$, '{id,a,b}', per_row => $1)", per_row)
    writes = ("insert into app.t (id, a, b) values (1, 2, 3)", "update app.t set a = 4", "delete from app.t")
    swap = "alter table app.t rename a to c; alter table app.t rename b to a; alter table app.t rename c to b"
    other_type = "alter table app.t alter column a type bigint, alter column b type smallint"
    for statement in (*writes, swap, *writes, other_type, *writes):
        await sql.execute(statement)
    found = "select record::text from rowcast.events where kind in ('insert', 'update') order by id"
    assert ['{"id":1,"a":2,"b":3}', '{"id":1,"a":4,"b":3}'] * 3 == [text for [text] in await sql.fetch(found)]


async def test_row_triggers_capture_what_replication_applies(sql: Connection) -> None:
    await sql.execute("""
        create schema app;
        create table app.t (id integer primary key, room text);
        select rowcast.watch('app.t', 'r.room', '{id,room}', per_row => true);
        set session_replication_role = replica;
        insert into app.t values (1, 'a'), (2, 'b');
        update app.t set id = id + 10;
        update app.t set room = 'c' where id = 11;
        delete from app.t where id = 12;
        truncate app.t;
    """)
    assert [
        ("a", "insert", 1),
        ("b", "insert", 2),
        ("a", "delete", 1),
        ("a", "insert", 11),
        ("b", "delete", 2),
        ("b", "insert", 12),
        ("a", "leave", 11),
        ("c", "insert", 11),
        ("b", "delete", 12),
        ("*app", "truncate", None),
    ] == await events(sql)


async def test_a_strict_table_refuses_a_statement_that_cannot_be_captured_and_names_rowcast(sql: Connection) -> None:
    await sql.execute("create schema app; create table app.t (id integer primary key, n integer)")
    await sql.execute("select rowcast.watch('app.t', $$'t:' || 10 / r.n$$, '{id}')")
    with pytest.raises(asyncpg.DivisionByZeroError) as caught:
        async with sql.transaction():
            await sql.execute("insert into app.t values (1, 0)")
    assert "function rowcast.capture_" in (caught.value.context or "")
    assert 0 == await sql.fetchval("select count(*) from app.t")


async def test_a_lenient_table_keeps_the_row_and_records_a_lost_event_for_its_pack(sql: Connection) -> None:
    await sql.execute("create schema app; create table app.t (id integer primary key, n integer)")
    await sql.execute("select rowcast.watch('app.t', $$'t:' || 10 / r.n$$, '{id}', on_error => 'lenient')")
    await sql.execute("insert into app.t values (1, 0)")
    assert 1 == await sql.fetchval("select count(*) from app.t")
    assert ("INSERT", "22012") == tuple(await sql.fetchrow("select operation, sqlstate from rowcast.lost") or ())
    assert [("*app", "lost", None)] == await events(sql)


async def test_an_application_can_name_the_actor(notes: Connection) -> None:
    async with notes.transaction():
        await notes.execute("set local rowcast.actor = 'ada'")
        await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    assert "ada" == (await event(notes))["actor"]


async def test_an_actor_of_any_length_makes_no_event_large(notes: Connection) -> None:
    async with notes.transaction():
        await notes.execute("select set_config('rowcast.actor', repeat('é', 1000000), true)")
        await notes.execute("insert into app.notes (id, room, body) values (1, 'a', 'x')")
        assert "é" * 250 == (await event(notes))["actor"]
        await notes.execute("update app.notes set body = 'y'")
        assert "é" * 250 == (await event(notes))["actor"]
        await notes.execute("delete from app.notes")
        assert "é" * 250 == (await event(notes))["actor"]


async def test_times_are_published_in_utc_whatever_the_writers_time_zone(sql: Connection) -> None:
    await sql.execute("create schema app; create table app.t (id integer primary key, at timestamptz)")
    await sql.execute("select rowcast.watch('app.t', $$'t'$$, '{id,at}')")
    await sql.execute("set timezone = 'Asia/Tokyo'")
    await sql.execute("insert into app.t values (1, '2026-01-10T12:00:00Z')")
    assert "2026-01-10T12:00:00+00:00" == json.loads((await event(sql))["record"])["at"]


async def test_watching_the_same_way_again_does_nothing_and_locks_nothing(database: str) -> None:
    connection = await connect(database, application_name="test")
    await connection.execute(NOTES)
    await connection.execute(WATCH_NOTES)
    async with connection.transaction():
        assert "app.notes is watched already" == await connection.fetchval(WATCH_NOTES)
        assert 0 == await connection.fetchval(
            "select count(*) from pg_locks where relation = 'app.notes'::regclass and mode <> 'AccessShareLock'"
        )
    await connection.close()


async def test_other_rows_change_what_snapshots_read_and_lock_nothing(database: str) -> None:
    connection = await connect(database, application_name="test")
    await connection.execute(NOTES)
    await connection.execute("select rowcast.watch('app.topics', $$r.topic$$, '{id}')")
    await connection.execute("insert into app.topics values (1, 'a'), (2, 'a'), (3, 'b')")
    for condition, ids in (("$1 = r.topic", [1, 2]), ("r.id = 2 and $1 <> ''", [2]), ("$1 = '') or (true", [1, 2])):
        async with connection.transaction():
            watch = "select rowcast.watch('app.topics', $$r.topic$$, '{id}', rows => $1)"
            assert "app.topics is watched now" == await connection.fetchval(watch, condition)
            assert 0 == await connection.fetchval(
                "select count(*) from pg_locks where relation = 'app.topics'::regclass and mode <> 'AccessShareLock'"
            )
        name = await connection.fetchval("select snapshot_name from rowcast.watched where table_name = 'topics'")
        found = await connection.fetch(f"select key from rowcast.{name}('a', 10)")
        assert ids == [json.loads(row["key"])["id"] for row in found]
    await connection.close()


async def test_watching_with_other_arguments_replaces_the_capture(notes: Connection) -> None:
    await notes.execute("select rowcast.watch('app.notes', $$'all'$$, '{id}')")
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    assert [("*app", "lost", None), ("all", "insert", 1)] == await events(notes)


async def test_watching_again_repairs_a_disabled_trigger(notes: Connection) -> None:
    await notes.execute("alter table app.notes disable trigger rowcast_insert")
    assert "app.notes is watched now" == await notes.fetchval(WATCH_NOTES)
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    assert [("*app", "lost", None), ("room:a", "insert", 1)] == await events(notes)


@for_each(
    "gap",
    [
        "select rowcast.unwatch('app.notes')",
        "alter table app.notes disable trigger all",
        "drop trigger rowcast_insert on app.notes",
        "drop function rowcast.capture_1_notes() cascade",
        "create or replace function rowcast.capture_1_notes() returns trigger"
        " language plpgsql as 'begin return null; end'",
        "alter table app.notes rename to old; create table app.notes (like app.old including all)",
        "drop table app.notes; " + NOTES.partition(";")[2].partition(";")[0],
    ],
)
async def test_watching_a_table_that_was_not_captured_for_a_while_resets_its_pack_and_ends_its_rights(
    notes: Connection, gap: str
) -> None:
    name = await notes.fetchval("select function_name from rowcast.watched where table_name = 'notes'")
    await notes.execute(gap.replace("capture_1_notes", name))
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    assert [] == await events(notes)
    await notes.execute(WATCH_NOTES)
    lost = await event(notes)
    assert ("*app", "lost", "{}") == (lost["topic"], lost["kind"], lost["revokes"])
    assert "app.notes is watched already" == await notes.fetchval(WATCH_NOTES)
    assert [] == await events(notes)


@for_each(
    "change",
    [
        ("{id,room,body,extra}", "{id,room,body}"),
        ("'room:' ||", "'rooms:' ||"),
        ("soft_delete => 'deleted_at', ", ""),
        (")\n", ", model => 'note')\n"),
        (")\n", ", per_row => true)\n"),
    ],
)
async def test_watching_a_table_otherwise_resets_its_pack_only_if_other_rows_or_columns_are_sent(
    notes: Connection, change: tuple[str, str]
) -> None:
    watch = WATCH_NOTES.replace(*change)
    assert WATCH_NOTES != watch
    await notes.execute(watch)
    sent_the_same = "model" in change[1] or "per_row" in change[1]
    assert ([] if sent_the_same else [("*app", "lost", None)]) == await events(notes)


async def test_a_column_that_was_made_anew_resets_the_pack_once_the_table_is_watched_again(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room, body) values (1, 'a', 'old')")
    await events(notes)
    await notes.execute(
        "alter table app.notes drop column body; alter table app.notes add column body text default 'new'"
    )
    await notes.execute(WATCH_NOTES)
    assert [("*app", "lost", None)] == await events(notes)
    await notes.execute(WATCH_NOTES)
    assert [] == await events(notes)


async def test_a_new_version_of_the_triggers_resets_nothing(notes: Connection) -> None:
    body = await notes.fetchval("select pg_get_functiondef('rowcast.capture_body'::regproc)")
    await notes.execute(body.replace("#variable_conflict use_column", "#variable_conflict use_column\n-- newer"))
    assert "app.notes is watched now" == await notes.fetchval(WATCH_NOTES)
    assert [] == await events(notes)


async def test_a_renamed_table_is_never_read_under_the_name_that_another_has_now(notes: Connection) -> None:
    await notes.execute("alter table app.notes rename to old")
    another = "create table app.notes (like app.old including all); insert into app.notes values (1, 'b', 'x')"
    for other in ("select", another):
        await notes.execute(other)
        await notes.execute("""
            do $$ begin
                insert into app.old (id, room) values (1, 'a');
                update app.old set body = 'y';
                delete from app.old;
            end $$
        """)
        assert [("room:a", "insert", 1), ("*app", "lost", None), ("*app", "lost", None)] == await events(notes)


async def test_an_unwatched_table_is_silent_and_has_no_trigger_or_function(notes: Connection) -> None:
    await notes.execute("select rowcast.unwatch('app.notes')")
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    assert [] == await events(notes)
    assert 0 == await notes.fetchval("select count(*) from pg_trigger where tgrelid = 'app.notes'::regclass")
    assert 0 == await notes.fetchval("select count(*) from pg_proc where proname like 'capture%notes'")


async def test_the_capture_function_of_a_dropped_table_is_dropped(notes: Connection) -> None:
    await notes.execute("drop table app.notes")
    await notes.execute("select rowcast.unwatch_dropped()")
    assert 0 == await notes.fetchval("select count(*) from pg_proc where proname like 'capture%notes'")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("'app.notes', $$'t'$$, '{id,nothing}'", "app.notes has no column nothing"),
        ("'app.notes', $$'t'$$, '{id}', key => '{room}'", "is no key of app.notes"),
        ("'app.notes', $$'t'$$, '{}'", "at least one column"),
        ("'app.notes', $$r.nothing$$, '{id}'", "nothing"),
        ("'app.notes', $$r.id$$, '{id}'", "a topic is text or text"),
        ("'app.notes', $$'t'$$, '{id}', revokes => $$'x'::text$$", "revokes is jsonb"),
        ("'app.notes', $$'t'$$, '{id}', soft_delete => 'nothing'", "no column nothing"),
        ("'app.notes', $$'t'$$, '{id}', on_error => 'perhaps'", "strict or lenient"),
        ("'app.notes', $$'t'$$, '{id}', rows => $$r.nothing$$", r"app.notes cannot be found by \(r.nothing\)"),
        ("'app.notes', $$'t'$$, '{id}', rows => $$r.room$$", "must be type boolean"),
        ("'app.notes', $$'t'$$, '{id}', rows => $$true) union (true$$", "cannot be found by"),
        ("'app.topics', $$'t'$$, '{id}', rows => $$r.topic = topic$$", "write .1 for the topic"),
        ("'rowcast.events', $$'t'$$, '{id}'", "cannot be watched"),
        ("'pg_catalog.pg_class', $$'t'$$, '{oid}', key => '{oid}'", "cannot be watched"),
    ],
)
async def test_watch_rejects_bad_arguments_and_names_the_mistake(notes: Connection, call: str, message: str) -> None:
    with pytest.raises(asyncpg.PostgresError, match=message):
        await notes.execute(f"select rowcast.watch({call})")


async def test_awkward_names_are_quoted_by_the_server(sql: Connection) -> None:
    await sql.execute("""
        create schema "Odd; drop table x";
        create table "Odd; drop table x"."Ta'b""le" ("I d" integer primary key, "$topics" text, "%s" text);
    """)
    await sql.execute("""
        select rowcast.watch(
            '"Odd; drop table x"."Ta''b""le"', $$r."%s"$$, array['I d', '$topics', '%s'], array['I d'])
    """)
    await sql.execute("""insert into "Odd; drop table x"."Ta'b""le" values (1, 'x', 'room')""")
    await sql.execute("""update "Odd; drop table x"."Ta'b""le" set "$topics" = 'y'""")
    await sql.execute("""delete from "Odd; drop table x"."Ta'b""le" """)
    rows = await sql.fetch("select topic, kind, key, changed from rowcast.events order by id")
    assert [
        ("room", "insert", '{"I d":1}', None),
        ("room", "update", '{"I d":1}', ["$topics"]),
        ("room", "delete", '{"I d":1}', None),
    ] == [tuple(row) for row in rows]


async def test_a_writer_needs_no_right_in_rowcast_and_gets_none(notes: Connection) -> None:
    await notes.execute("""
        create role writer_of_notes;
        grant usage on schema app to writer_of_notes;
        grant all on app.notes to writer_of_notes;
        set role writer_of_notes;
    """)
    try:
        await notes.execute("insert into app.notes (id, room) values (1, 'a')")
        for forbidden in (
            "select * from rowcast.events",
            "insert into rowcast.events (watch, topic, kind, key) values (1, 't', 'insert', '{}')",
            "select rowcast.watch('app.notes', $$'t'$$, '{id}')",
            "select rowcast.unwatch('app.notes')",
            "select rowcast.open_term(gen_random_uuid(), null, '8 s', false, null, 0)",
        ):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with notes.transaction():
                    await notes.execute(forbidden)
    finally:
        await notes.execute("reset role; drop owned by writer_of_notes; drop role writer_of_notes")
    assert [("room:a", "insert", 1)] == await events(notes)


async def test_objects_that_shadow_builtins_do_not_affect_capture(notes: Connection) -> None:
    await notes.execute("""
        create temp table events (like rowcast.events);
        create function pg_temp.pg_notify(text, text) returns void language sql as 'select 1/0';
        create function pg_temp.unnest(text[]) returns setof text language sql as 'select (1/0)::text';
        create function pg_temp.array_remove(anyarray, anyelement) returns anyarray language sql as 'select null';
        set search_path = pg_temp, pg_catalog, public;
        insert into app.notes (id, room, body) values (1, 'a', 'true');
        reset search_path;
    """)
    assert "true" == json.loads((await event(notes))["record"])["body"]


async def test_the_capture_function_belongs_to_a_role_that_may_only_write_events(notes: Connection) -> None:
    owner = await notes.fetchval("select proowner::regrole::text from pg_proc where proname like 'capture%notes'")
    assert "rowcast_capture" == owner
    rows = await notes.fetch(
        """select table_schema || '.' || table_name as name, privilege_type from information_schema.table_privileges
           where grantee = 'rowcast_capture' order by 1, 2"""
    )
    assert [("rowcast.events", "INSERT"), ("rowcast.lost", "INSERT")] == [tuple(row) for row in rows]


async def test_a_session_with_rowcast_ring_off_is_captured(notes: Connection) -> None:
    await notes.execute("listen rowcast; set rowcast.ring = off")
    async with notes.transaction():
        await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    assert [("room:a", "insert", 1)] == await events(notes)


async def test_a_megabyte_is_captured_whole(notes: Connection) -> None:
    await notes.execute("insert into app.notes (id, room, body) values (1, 'a', repeat('€', 400000))")
    assert "€" * 400_000 == json.loads((await event(notes))["record"])["body"]


@pytest.mark.parametrize(
    ("between", "is_reset"),
    [
        ("select 1", False),
        ("alter table app.notes add column mood text", False),
        ("insert into app.notes (id, room) values (2, 'a')", True),
        ("delete from app.notes where id = 1", True),
        ("truncate app.notes", True),
        ("set local track_counts = off; delete from app.notes where id = 1", True),
    ],
)
async def test_a_table_that_is_watched_again_in_a_transaction_is_reset_only_if_that_wrote_to_it_meanwhile(
    notes: Connection, between: str, is_reset: bool
) -> None:
    await notes.execute("insert into app.notes (id, room) values (1, 'a')")
    await events(notes)
    await notes.execute(f"select rowcast.unwatch('app.notes'); {between}; {WATCH_NOTES}")
    assert (["lost"] if is_reset else []) == [kind for _, kind, _ in await events(notes)]
