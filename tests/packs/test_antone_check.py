"""The rules of Antone's own that `daemon check` applies, after one manual change at a time."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.postgres.connect import Connection
from daemon.schema import migrate
from daemon.schema.capture_check import check_rules
from daemon.schema.sql_files import BadSqlFile
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
    ("change", "problem"),
    [
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


async def test_problems_in_another_schema_are_reported_there(empty_database: str) -> None:
    await migrate.apply(empty_database, ["antone"], schemas={"antone": "elsewhere"}, report=lambda _: None)
    options = ("--pack", "antone", "--schema", "elsewhere", "check")
    assert 0 == (await command(*options, DATABASE_URL=empty_database))[0]
    await execute(
        empty_database,
        "drop index elsewhere.posts_processed_at_idx; create table elsewhere.notes (written_at timestamp)",
    )
    code, output, errors = await command(*options, DATABASE_URL=empty_database)
    assert (1, "") == (code, errors)
    assert [
        "index elsewhere.posts_processed_at_idx: it is missing: "
        "CREATE INDEX posts_processed_at_idx ON elsewhere.posts USING btree (processed_at)",
        "elsewhere.notes.written_at: the timestamp has no time zone: make it a timestamptz",
    ] == output.splitlines()


async def test_a_pack_that_is_not_applied_is_not_checked(empty_database: str) -> None:
    await migrate.apply(empty_database, [], report=lambda _: None)
    code, output, _ = await command("--pack", "antone", "check", DATABASE_URL=empty_database)
    assert 1 == code
    assert [
        "The schema is not current (schema antone is at nothing, not at antone_0008): run `daemon --apply-ddl` first."
    ] == (output.splitlines())


async def test_a_pack_without_a_check_file_has_no_problems(sql: Connection, tmp_path: Path) -> None:
    assert [] == await check_rules(sql, "chatgenius", "chatgenius", ddl_folder=tmp_path)


async def test_a_check_file_that_writes_is_stopped_by_the_server(database: str, tmp_path: Path) -> None:
    (tmp_path / "chatgenius").mkdir()
    (tmp_path / "chatgenius" / "check.sql").write_text("delete from chatgenius.users returning id, id, id")
    async with session(database) as sql:
        with pytest.raises(BadSqlFile, match=r"chatgenius/check\.sql, line 1: it writes, but a check may only read"):
            await check_rules(sql, "chatgenius", "chatgenius", ddl_folder=tmp_path)
