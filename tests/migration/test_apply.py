"""Applying: what it does, in which order, and what remains after a failure."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable

import asyncpg
import pytest

from daemon.packs import UnknownPack
from daemon.postgres.errors import DatabaseFault, DuplicateRows, ObjectExists
from daemon.schema import migrate
from daemon.schema.revisions import InvalidRevisions, NewerDatabase, UnknownHistory
from daemon.schema.sql_files import BadSchemaName, BadSqlFile
from tests.support.catalog import catalog
from tests.support.folders import Folders, execute, value

SCHEMAS = ("rowcast", "shop", "test")


def test_the_serving_process_does_not_load_the_migration_engine() -> None:
    program = "import sys, daemon.schema.migrate; print({'alembic', 'sqlalchemy'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "set()\n" == process.stdout


async def test_an_empty_database_gets_rowcasts_schema_first_and_then_the_pack(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    report = await folders.apply(empty_database, "shop")
    assert ["rowcast: nothing -> rowcast_0001", "shop: nothing -> shop_0002"] == folders.reported
    assert [str(m) for m in report.moves] == ["rowcast: nothing -> rowcast_0001", "shop: nothing -> shop_0002"]
    assert report.changed
    assert await value(empty_database, "select to_regclass('shop.names') is not null")
    assert "shop_0002" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_second_apply_changes_nothing(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    once = await catalog(empty_database, SCHEMAS)
    folders.reported.clear()
    report = await folders.apply(empty_database, "shop")
    assert not report.changed
    assert ["rowcast: already at rowcast_0001", "shop: already at shop_0002"] == folders.reported
    assert once == await catalog(empty_database, SCHEMAS)


async def test_a_later_apply_runs_only_new_revisions(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="create table shop.once ();")
    await folders.apply(empty_database, "shop")
    folders.revision("shop", 2, up="create table shop.later ();")
    report = await folders.apply(empty_database, "shop")
    assert "shop: shop_0001 -> shop_0002" == str(report.moves[-1])


async def test_of_four_concurrent_applies_one_changes_the_schema_and_three_find_it_done(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    program = (
        "import asyncio, sys; from pathlib import Path; from daemon.schema import migrate\n"
        "dsn, root = sys.argv[1], Path(sys.argv[2])\n"
        "asyncio.run(migrate.apply(dsn, ['shop'], report=print, ddl_folder=root / 'ddl',"
        " triggers_folder=root / 'triggers'))"
    )
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, empty_database, folders.ddl.parent, stdout=subprocess.PIPE
        )
        for _ in range(4)
    ]
    outputs = [(await process.communicate())[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert 1 == sum("shop: nothing -> shop_0002" in output for output in outputs)
    assert 3 == sum("shop: already at shop_0002" in output for output in outputs)


async def test_concurrent_applies_in_one_process_do_not_interfere(folders: Folders, empty_database: str) -> None:
    folders.shop()
    reports = await asyncio.gather(*(folders.apply(empty_database, "shop") for _ in range(4)))
    assert [False, False, False, True] == sorted(report.changed for report in reports)


async def test_an_apply_that_waits_for_another_reports_which(folders: Folders, empty_database: str) -> None:
    waiting = asyncio.Event()

    def report(line: str) -> None:
        folders.reported.append(line)
        if line.startswith("waiting for"):
            waiting.set()

    other = await asyncpg.connect(empty_database, server_settings={"application_name": "other apply"})
    await other.execute(f"select pg_advisory_lock({migrate.LOCK})")
    applying = asyncio.create_task(folders.apply(empty_database, report=report))
    await waiting.wait()
    await other.close()
    await applying
    assert "(other apply of " in folders.reported[0]
    assert "rowcast: nothing -> rowcast_0001" == folders.reported[-1]


async def test_a_failing_first_revision_leaves_nothing_of_its_pack(folders: Folders, empty_database: str) -> None:
    await folders.apply(empty_database)
    before = await catalog(empty_database, SCHEMAS)
    folders.revision("shop", 1, up="create table shop.goods ();\n\nselect 1 / 0;")
    with pytest.raises(DatabaseFault) as caught:
        await folders.apply(empty_database, "shop")
    assert before == await catalog(empty_database, SCHEMAS)
    assert "in shop/0001_part.up.sql: division by zero (SQLSTATE 22012)" in str(caught.value)


async def test_a_failing_later_revision_keeps_those_before_it(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="create table shop.goods ();")
    await folders.apply(empty_database, "shop")
    folders.revision("shop", 2, up="create table shop.kept ();")
    folders.revision("shop", 3, up="create table shop.more ();\ncreate tabel shop.even_more ();")
    with pytest.raises(DatabaseFault, match=r"in shop/0003_part\.up\.sql, line 2: syntax error") as caught:
        await folders.apply(empty_database, "shop")
    assert 20 == caught.value.exit_code
    after = await catalog(empty_database, SCHEMAS)
    assert {"relation shop.alembic_version", "relation shop.goods", "relation shop.kept"} == {
        name for name, facts in after.items() if name.startswith("relation shop.") and facts["kind"] == "r"
    }
    assert "shop_0002" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_failing_trigger_file_keeps_the_revisions(folders: Folders, empty_database: str) -> None:
    folders.shop()
    (folders.triggers / "shop.sql").write_text("create function shop.f() returns int return 1;\nselect shop.g();")
    with pytest.raises(DatabaseFault, match=r"in triggers/shop\.sql, line 2: function shop\.g\(\) does not exist"):
        await folders.apply(empty_database, "shop")
    assert await value(empty_database, "select to_regproc('shop.f') is null")
    assert "shop_0002" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_the_trigger_file_runs_at_every_apply(folders: Folders, empty_database: str) -> None:
    folders.shop()
    (folders.triggers / "shop.sql").write_text("insert into shop.goods select count(*), 'a' from shop.goods;")
    await folders.apply(empty_database, "shop")
    await folders.apply(empty_database, "shop")
    assert 2 == await value(empty_database, "select count(*) from shop.goods")


async def test_text_that_looks_like_a_parameter_reaches_the_server_unchanged(
    folders: Folders, empty_database: str
) -> None:
    folders.revision(
        "shop",
        1,
        up="create table shop.odd (a text default ':name %s %(x)s $1 {y}', b int[] default (array[1, 2, 3])[1:2]);",
    )
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "insert into shop.odd default values")
    assert ":name %s %(x)s $1 {y}" == await value(empty_database, "select a from shop.odd")


async def test_a_revision_may_contain_only_comments(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="-- nothing to do here\n")
    (folders.triggers / "shop.sql").write_text("-- nor here\n")
    await folders.apply(empty_database, "shop")
    assert "shop_0001" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_warnings_and_notices_of_the_server_are_reported(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="do $$ begin raise warning 'no such extension'; raise notice 'a hint'; end $$;")
    await folders.apply(empty_database, "shop")
    assert ["warning: no such extension", "notice: a hint"] == folders.reported[1:3]


async def test_the_engine_prints_and_logs_nothing(
    folders: Folders, empty_database: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folders.shop()
    await folders.apply(empty_database, "shop")
    assert ("", "") == capfd.readouterr()
    assert [record for record in caplog.records if record.name.startswith(("alembic", "sqlalchemy"))] == []


async def test_names_without_a_schema_are_not_found_in_public(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="create table goods ();")
    with pytest.raises(DatabaseFault, match="write the name of a new object with its schema"):
        await folders.apply(empty_database, "shop")


async def test_a_session_setting_of_one_revision_does_not_reach_the_next(
    folders: Folders, empty_database: str
) -> None:
    folders.revision(
        "shop", 1, up="set search_path = shop; set role pg_read_all_data; reset role; create table shop.a ();"
    )
    folders.revision("shop", 2, up="create table b ();")
    with pytest.raises(DatabaseFault, match="write the name of a new object with its schema"):
        await folders.apply(empty_database, "shop")


@pytest.mark.parametrize("statement", ["commit;", "begin;", "rollback;", "end;", "start transaction;", "abort"])
async def test_a_file_that_handles_transactions_is_refused_and_nothing_is_done(
    folders: Folders, empty_database: str, statement: str
) -> None:
    folders.revision("shop", 1, up=f"create table shop.goods ();\n{statement}")
    with pytest.raises(BadSqlFile, match=r"shop/0001_part\.up\.sql, line 2: ") as caught:
        await folders.apply(empty_database, "shop")
    assert 65 == caught.value.exit_code
    assert await value(empty_database, "select to_regnamespace('shop') is null")


async def test_a_commit_in_a_do_block_cannot_end_the_transaction(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="create table shop.goods ();\ndo $$ begin commit; end $$;")
    with pytest.raises(DatabaseFault, match="2D000"):
        await folders.apply(empty_database, "shop")
    assert await value(empty_database, "select to_regnamespace('shop') is null")


async def test_an_index_is_built_concurrently_while_another_apply_waits(
    folders: Folders, empty_database: str
) -> None:
    folders.revision("shop", 1, up="create table shop.goods (id int);")
    folders.revision(
        "shop",
        2,
        up="-- no-transaction\n"
        "drop index concurrently if exists shop.goods_id;\n"
        "create index concurrently goods_id on shop.goods (id);",
        down="-- no-transaction\ndrop index concurrently shop.goods_id;",
    )
    reports = await asyncio.gather(*(folders.apply(empty_database, "shop") for _ in range(2)))
    assert [False, True] == sorted(report.changed for report in reports)
    assert await value(empty_database, "select indisvalid from pg_index where indexrelid = 'shop.goods_id'::regclass")
    await folders.rollback(empty_database, "shop", to="shop_0001")
    assert await value(empty_database, "select to_regclass('shop.goods_id') is null")


async def test_a_failed_file_without_a_transaction_is_reported_by_line_and_can_run_again(
    folders: Folders, empty_database: str
) -> None:
    folders.revision("shop", 1, up="create table shop.goods (id int); insert into shop.goods values (1), (1);")
    folders.revision(
        "shop",
        2,
        up="-- no-transaction\n"
        "drop index concurrently if exists shop.goods_id;\n"
        "create unique index concurrently goods_id\n    on shop.goods (id);",
    )
    with pytest.raises(DuplicateRows, match=r'"goods_id" in shop/0002_part\.up\.sql, line 3: '):
        await folders.apply(empty_database, "shop")
    assert "shop_0001" == await value(empty_database, "select version_num from shop.alembic_version")
    await execute(empty_database, "truncate shop.goods")
    await folders.apply(empty_database, "shop")
    assert await value(empty_database, "select indisvalid from pg_index where indexrelid = 'shop.goods_id'::regclass")


async def test_the_first_revision_may_run_without_a_transaction(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="-- no-transaction\ncreate table shop.goods ();", down="drop table shop.goods;")
    await folders.apply(empty_database, "shop")
    assert "shop_0001" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_table_that_exists_already_is_reported(folders: Folders, empty_database: str) -> None:
    await execute(empty_database, "create schema shop; create table shop.goods ();")
    folders.shop()
    with pytest.raises(ObjectExists, match=r'relation "goods" already exists in shop/0001_part\.up\.sql') as caught:
        await folders.apply(empty_database, "shop")
    assert 16 == caught.value.exit_code


# Histories that do not match the files


async def test_a_database_newer_than_the_files_is_refused(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "update shop.alembic_version set version_num = 'shop_0007'")
    with pytest.raises(NewerDatabase, match="Schema shop is at shop_0007, newer than shop_0002") as caught:
        await folders.apply(empty_database, "shop")
    assert 21 == caught.value.exit_code


async def test_a_schema_with_the_applications_own_alembic_history_is_refused(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    await execute(
        empty_database,
        "create table public.alembic_version (version_num text);"
        "insert into public.alembic_version values ('ae1027a6acf');",
    )
    with pytest.raises(UnknownHistory, match="Schema public has another application's Alembic history") as caught:
        await folders.apply(empty_database, "shop", schemas={"shop": "public"})
    assert 22 == caught.value.exit_code


async def test_an_unknown_pack_is_refused_with_a_list_of_packs(folders: Folders, empty_database: str) -> None:
    folders.shop()
    with pytest.raises(UnknownPack, match=r'There is no pack "shoe": choose among rowcast, shop\.'):
        await folders.apply(empty_database, "shoe")


def _gap(folders: Folders) -> None:
    for path in (folders.ddl / "shop").glob("0001_*"):
        path.unlink()


def _duplicate(folders: Folders) -> None:
    for path in list((folders.ddl / "shop").glob("0002_*")):
        path.with_name(path.name.replace("part", "twin")).write_bytes(path.read_bytes())


def _second_head(folders: Folders) -> None:
    folders.revision("shop", 3, up="select 1;").write_text(
        (folders.ddl / "shop" / "0002_part.py").read_text().replace('"shop_0002"', '"shop_0003"')
    )


def _no_up(folders: Folders) -> None:
    (folders.ddl / "shop" / "0002_part.up.sql").unlink()


def _no_python(folders: Folders) -> None:
    (folders.ddl / "shop" / "0002_part.py").unlink()


def _no_revision(folders: Folders) -> None:
    (folders.ddl / "shop" / "0002_part.py").write_text("revision = 'shop_2'\ndown_revision = 'shop_0001'\n")


@pytest.mark.parametrize(
    ("break_history", "problem"),
    [
        (_gap, "0002_part.py should be 0001_<name>.py"),
        (_duplicate, "0002_twin.py should be 0003_<name>.py"),
        (_second_head, 'should say revision = "shop_0003", down_revision = "shop_0002"'),
        (_no_up, "there is no 0002_part.up.sql"),
        (_no_python, "0002_part.down.sql has no .py file"),
        (_no_revision, 'should say revision = "shop_0002", down_revision = "shop_0001"'),
    ],
)
async def test_inconsistent_revisions_are_refused(
    folders: Folders, empty_database: str, break_history: Callable[[Folders], None], problem: str
) -> None:
    folders.shop()
    break_history(folders)
    with pytest.raises(InvalidRevisions) as caught:
        await folders.apply(empty_database, "shop")
    assert problem in str(caught.value)
    assert await value(empty_database, "select to_regnamespace('shop') is null")


# Other schema names


async def test_a_pack_can_be_applied_to_another_schema(folders: Folders, empty_database: str) -> None:
    folders.shop()
    (folders.triggers / "shop.sql").write_text(
        "create or replace function shop.f() returns text language sql as $$ select 'shop.goods'::regclass::text $$;"
    )
    await folders.apply(empty_database, "shop", schemas={"shop": "test"})
    assert await value(empty_database, "select to_regnamespace('shop') is null")
    assert "test.goods" == await value(empty_database, "select test.f()")
    assert "shop in schema test: nothing -> shop_0002" == folders.reported[-1]


async def test_a_pack_can_be_applied_to_two_schemas_of_a_database(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    await folders.apply(empty_database, "shop", schemas={"shop": "test"})
    both = await catalog(empty_database, SCHEMAS)
    shop = {name for name in both if "shop." in name}
    assert shop
    assert {name.replace("shop.", "test.") for name in shop} == {name for name in both if "test." in name}


async def test_a_pack_can_be_applied_to_the_public_schema(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop", schemas={"shop": "public"})
    assert await value(empty_database, "select to_regclass('public.goods') is not null")


@pytest.mark.parametrize(
    "name",
    [
        "rowcast",
        "pg_catalog",
        "pg_temp",
        "information_schema",
        "Test",
        "te-st",
        'x"; drop table y',
        "1st",
        "",
        "a" * 64,
        "select",
        "user",
    ],
)
async def test_a_schema_name_that_needs_quotes_or_is_taken_is_refused(
    folders: Folders, empty_database: str, name: str
) -> None:
    folders.shop()
    with pytest.raises(BadSchemaName) as caught:
        await folders.apply(empty_database, "shop", schemas={"shop": name})
    assert 64 == caught.value.exit_code


async def test_two_packs_cannot_share_a_schema(folders: Folders, empty_database: str) -> None:
    folders.shop()
    folders.revision("stall", 1, up="create table stall.goods ();")
    with pytest.raises(BadSchemaName, match="shop and stall cannot share it"):
        await folders.apply(empty_database, "shop", "stall", schemas={"shop": "test", "stall": "test"})


# Current and stale schemas


async def test_a_schema_is_stale_until_it_is_at_the_newest_revision(folders: Folders, empty_database: str) -> None:
    connection = await asyncpg.connect(empty_database)

    async def stale() -> str | None:
        return await migrate.stale(connection, ["shop"], ddl_folder=folders.ddl)

    folders.revision("shop", 1, up="create table shop.goods ();")
    assert "schema rowcast is at nothing, not at rowcast_0001" == await stale()
    await folders.apply(empty_database)
    assert "schema shop is at nothing, not at shop_0001" == await stale()
    await folders.apply(empty_database, "shop")
    assert await stale() is None
    folders.revision("shop", 2, up="create table shop.more ();")
    assert "schema shop is at shop_0001, not at shop_0002" == await stale()
    assert migrate.heads(["shop"], schemas={"shop": "test"}, ddl_folder=folders.ddl) == {
        "rowcast": "rowcast_0001",
        "test": "shop_0002",
    }
    await connection.close()


def test_the_bundled_packs_are_known_by_name() -> None:
    assert "chatgenius" in migrate.bundled()
    assert "rowcast" not in migrate.bundled()
