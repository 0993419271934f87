"""The problems that `daemon check` finds in Antone's schema, after one manual change at a time."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.postgres.connect import Connection
from daemon.postgres.errors import DatabaseFault
from daemon.schema import migrate
from daemon.schema.capture_check import check_rules
from tests.packs.databases import session, undone
from tests.support.cases import for_each
from tests.support.daemon import command
from tests.support.folders import execute
from tests.support.postgres import Server


async def nothing(_: Connection) -> None:
    """A database with the packs and no rows."""


@pytest.fixture
async def sql(postgres: Server) -> AsyncIterator[Connection]:
    async with undone(postgres, "packs", nothing) as connection:
        yield connection


async def problems(sql: Connection) -> list[str]:
    return [str(one) for one in await check_rules(sql, "antone", "antone")]


async def test_the_schema_that_the_revisions_create_has_no_problems(sql: Connection) -> None:
    assert [] == await problems(sql)


@for_each(
    ("change", "said"),
    [
        (
            "alter table antone.posts drop constraint posts_author_id_fkey, add constraint posts_author_id_fkey"
            " foreign key (author_id) references antone.authors (id)",
            "posts_author_id_fkey on antone.posts: it has ON DELETE NO ACTION, not CASCADE: "
            "drop it and create it again, as in the revisions",
        ),
        (
            "alter table antone.replies drop constraint replies_decision_id_fkey, add constraint"
            " replies_decision_id_fkey foreign key (decision_id) references antone.decisions (id) on delete cascade",
            "replies_decision_id_fkey on antone.replies: it has ON DELETE CASCADE, not RESTRICT: "
            "drop it and create it again, as in the revisions",
        ),
        (
            "create table antone.notes (post_id uuid not null, constraint notes_post_id_fkey foreign key (post_id)"
            " references antone.posts (id)); create index notes_post_id_idx on antone.notes (post_id)",
            "notes_post_id_fkey on antone.notes: it has no ON DELETE action: drop it and create it again with one",
        ),
        (
            "create table antone.notes (post_id uuid not null, constraint notes_post_id_fkey foreign key (post_id)"
            " references antone.posts (id) on delete cascade)",
            "notes_post_id_fkey on antone.notes: no index begins with its columns: create one",
        ),
        (
            "alter table antone.posts alter column created_at drop default",
            "antone.posts.created_at: the required timestamp has no default: "
            "alter column ... set default current_timestamp",
        ),
        (
            "create table antone.notes (written_at timestamp)",
            "antone.notes.written_at: the timestamp has no time zone: make it a timestamptz",
        ),
        (
            "drop index antone.replies_platform_post_id_idx",
            "antone.replies: no index on (platform_post_id): create it again",
        ),
        (
            "alter index antone.decisions_mode_idx rename to by_mode",
            "antone.by_mode: it should be called decisions_mode_idx: rename it",
        ),
        (
            "create table antone.notes (id uuid constraint the_key primary key)",
            "the_key on antone.notes: it should be called notes_pkey: rename it",
        ),
        (
            "create table antone.notes (a int, b int, constraint notes_once unique (a, b))",
            "notes_once on antone.notes: it should be called notes_a_b_key: rename it",
        ),
        (
            "create table antone.notes (post_id uuid constraint to_post references antone.posts (id)"
            " on delete cascade); create index notes_post_id_idx on antone.notes (post_id)",
            "to_post on antone.notes: it should be called notes_post_id_fkey: rename it",
        ),
        (
            "create table antone.notes (a int constraint positive check (a > 0))",
            "positive on antone.notes: it should be called notes_...: rename it",
        ),
        (
            'create table antone."Notes" (id uuid)',
            'antone."Notes": the name contains characters other than a-z, 0-9 and _: rename it',
        ),
        (
            'create table antone.notes ("writtenBy" uuid)',
            'antone.notes."writtenBy": the name contains characters other than a-z, 0-9 and _: rename it',
        ),
        (
            "alter table antone.authors drop constraint authors_follower_count_not_negative",
            "authors_follower_count_not_negative: the constraint is missing: add it again, as in the revisions",
        ),
        (
            "alter table antone.authors drop constraint authors_handle_is_handle, add constraint"
            " authors_handle_is_handle check (handle <> '') not valid",
            "authors_handle_is_handle on antone.authors: it was never validated: alter table ... validate constraint",
        ),
        (
            "alter table antone.posts drop column error_message",
            "antone.posts.error_message: the column is missing: add it again: text",
        ),
        (
            "alter table antone.posts add column mood text",
            "antone.posts.mood: no revision creates this column: drop it, or write a revision",
        ),
        (
            "alter table antone.posts alter column error_message type varchar(10)",
            "antone.posts.error_message: it is character varying(10), not text: change it back",
        ),
        (
            "alter table antone.decisions alter column mode drop not null",
            "antone.decisions.mode: it is antone.operational_mode, not antone.operational_mode not null: "
            "change it back",
        ),
        (
            "update pg_catalog.pg_index set indisvalid = false where indexrelid = 'antone.posts_processed_at_idx'"
            "::regclass",
            "antone.posts_processed_at_idx: the index is invalid: reindex it, or drop it and create it again",
        ),
        (
            "alter table antone.replies disable trigger replies_set_updated_at",
            "antone.replies: no trigger maintains updated_at: create or enable its trigger again",
        ),
        (
            "alter role antone_app superuser",
            "role antone_app: it is a superuser: alter role antone_app nosuperuser",
        ),
        (
            "grant create on schema antone to antone_app",
            "role antone_app: it may create objects in schema antone: revoke create on schema antone from it",
        ),
    ],
)
async def test_each_problem_is_reported_with_its_remedy(sql: Connection, change: str, problem: str) -> None:
    await sql.execute(change)
    assert problem in await problems(sql)


async def test_a_missing_table_is_reported_before_what_went_with_it(sql: Connection) -> None:
    await sql.execute("drop table antone.learning_events")
    assert "antone.learning_events: the table is missing: restore it from a backup" == (await problems(sql))[0]


async def test_problems_in_another_schema_are_reported_there(empty_database: str) -> None:
    await migrate.apply(empty_database, ["antone"], schemas={"antone": "elsewhere"}, report=lambda _: None)
    options = ("--pack", "antone", "--schema", "elsewhere", "check")
    assert 0 == (await command(*options, DATABASE_URL=empty_database))[0]
    await execute(empty_database, "drop index elsewhere.posts_processed_at_idx")
    code, output, errors = await command(*options, DATABASE_URL=empty_database)
    assert (1, "") == (code, errors)
    assert "elsewhere.posts: no index on (processed_at): create it again\n" == output


async def test_daemon_check_prints_a_line_for_each_problem_and_exits_with_1(empty_database: str) -> None:
    await migrate.apply(empty_database, ["antone"], report=lambda _: None)
    assert 0 == (await command("--pack", "antone", "check", DATABASE_URL=empty_database))[0]
    await execute(
        empty_database,
        "drop index antone.decisions_created_at_idx; alter table antone.posts alter column created_at drop default",
    )
    code, output, errors = await command("--pack", "antone", "check", DATABASE_URL=empty_database)
    assert (1, "") == (code, errors)
    assert [
        "antone.decisions: no index on (created_at): create it again",
        "antone.posts.created_at: the required timestamp has no default: "
        "alter column ... set default current_timestamp",
    ] == output.splitlines()


async def test_a_pack_that_is_not_applied_is_not_checked(empty_database: str) -> None:
    await migrate.apply(empty_database, [], report=lambda _: None)
    code, output, _ = await command("--pack", "antone", "check", DATABASE_URL=empty_database)
    assert 1 == code
    assert [
        "The schema is not current (schema antone is at nothing, not at antone_0006): run `daemon --apply-ddl` first."
    ] == (output.splitlines())


async def test_a_pack_without_a_check_file_has_no_problems(sql: Connection, tmp_path: Path) -> None:
    assert [] == await check_rules(sql, "chatgenius", "chatgenius", ddl_folder=tmp_path)


async def test_a_check_file_that_writes_is_stopped_by_the_server(database: str, tmp_path: Path) -> None:
    (tmp_path / "chatgenius").mkdir()
    (tmp_path / "chatgenius" / "check.sql").write_text("delete from chatgenius.users returning id, id, id")
    async with session(database) as sql:
        with pytest.raises(DatabaseFault, match=r"in chatgenius/check\.sql: cannot execute DELETE in a read-only"):
            await check_rules(sql, "chatgenius", "chatgenius", ddl_folder=tmp_path)
