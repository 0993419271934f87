"""Reading .sql files: splitting statements, refusing some, and replacing the schema."""

from pathlib import Path

import pytest

from daemon.files import folder
from daemon.schema import sql_files
from daemon.schema.sql_files import BadSqlFile, SqlFile


def read(tmp_path: Path, text: str, schema: str = "shop") -> SqlFile:
    path = tmp_path / "0001_part.up.sql"
    path.write_text(text)
    return sql_files.read(path, pack="shop", schema=schema)


@pytest.mark.parametrize(
    ("text", "statements"),
    [
        ("select 1; select 2", ["select 1;", "select 2"]),
        ("select ';', E'\\';', \"a;\"; select 2;", ["select ';', E'\\';', \"a;\";", "select 2;"]),
        ("select 'it''s;'; select 2;", ["select 'it''s;';", "select 2;"]),
        ("-- one; two\nselect 1 -- ; three\n; -- four", ["select 1 -- ; three\n;"]),
        ("/* a; /* b; */ c; */ select 1; /* ; ", ["select 1;"]),
        ("do $$ a; $$; do $x$ $$; $x$; select a$1;", ["do $$ a; $$;", "do $x$ $$; $x$;", "select a$1;"]),
        ("select $1; select $2;", ["select $1;", "select $2;"]),
        ("create rule r as on insert to t do (select 1; select 2); select 3;",
         ["create rule r as on insert to t do (select 1; select 2);", "select 3;"]),
        ("create function f() returns int begin atomic select case when a then 1 end; select 2; end; select 3;",
         ["create function f() returns int begin atomic select case when a then 1 end; select 2; end;", "select 3;"]),
        ("create table t (begin int); select 1;", ["create table t (begin int);", "select 1;"]),
        (" ;; ; ", []),
        ("-- only a comment", []),
    ],
)  # fmt: skip
def test_statements_are_split_as_the_server_splits_them(tmp_path: Path, text: str, statements: list[str]) -> None:
    assert statements == [statement.text for statement in read(tmp_path, text).statements]


@pytest.mark.parametrize(
    "text",
    [
        "commit;",
        "COMMIT AND CHAIN;",
        "select 1;\n;commit",
        "/* */ Begin;",
        "rollback to savepoint a;",
        "do $$ $$; commit;",
        "select 'it''s'; commit;",
        "create table t (begin int, atomic int); commit;",
        "prepare transaction 'x';",
        "start transaction;",
        "create index concurrently i on shop.t (a);",
        "-- no-transaction\ncommit;",
        "alter table shop.t detach partition shop.p concurrently;",
    ],
)
def test_transaction_control_and_concurrently_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(BadSqlFile):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "comment on table shop.t is 'commit;';",
        "do $$ begin perform 1; end $$;",
        "-- commit;\nselect 1;",
        "create table shop.t (begin timestamptz, rollback int);",
        "refresh materialized view concurrently shop.v;",
        "-- no-transaction\ncreate index concurrently i on shop.t (a);",
        "create function shop.f() returns int begin atomic select 1; end;",
        "prepare p as select 1;",
    ],
)
def test_text_that_only_looks_like_transaction_control_is_accepted(tmp_path: Path, text: str) -> None:
    assert text == read(tmp_path, text).text


def test_a_refusal_contains_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(BadSqlFile) as caught:
        read(tmp_path, "select 1;\n\n  -- why\n  commit;")
    assert f"{tmp_path.name}/0001_part.up.sql, line 4: COMMIT is not allowed: " in str(caught.value)


def test_a_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "0001_part.up.sql"
    path.write_bytes(b"select '\xff'")
    with pytest.raises(BadSqlFile, match="not UTF-8"):
        sql_files.read(path, pack="shop", schema="shop")


def test_a_file_that_cannot_be_read_is_reported(tmp_path: Path) -> None:
    with pytest.raises(BadSqlFile, match=r"0009_gone\.sql, line 1: it cannot be read \(No such file or directory\)"):
        sql_files.read(tmp_path / "0009_gone.sql", pack="shop", schema="shop")


def test_the_packs_name_before_a_dot_is_replaced_by_the_schema(tmp_path: Path) -> None:
    text = "select shop.f('shop.goods'), $$ shop.x $$, workshop.y, \"shop\", 'shop', shopping.z -- shop.c"
    expected = "select test.f('test.goods'), $$ test.x $$, workshop.y, \"shop\", 'shop', shopping.z -- test.c"
    assert expected == read(tmp_path, text, schema="test").text


def test_every_bundled_file_can_be_read() -> None:
    paths = [path for name in ("ddl", "triggers") for path in folder(name).rglob("*.sql")]
    assert paths
    for path in paths:
        # A revision that changes rows may have nothing to undo, and says so.
        assert sql_files.read(path, pack="none", schema="none").statements or path.name.endswith(".down.sql")
