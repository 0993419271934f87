"""Rolling back: what is removed, what is kept, and what prevents it."""

import re

import pytest

from daemon.packs import UnknownPack
from daemon.postgres.errors import DatabaseFault, DependentObjects
from daemon.schema.migrate import RevisionNotReached, SchemaInUse
from daemon.schema.revisions import IrreversibleRevision, UnknownRevision
from daemon.schema.verify import VerificationFailed
from tests.support.catalog import catalog, contents
from tests.support.folders import Folders, execute, value

SCHEMAS = ("rowcast", "shop", "test")


async def test_a_rollback_leaves_nothing_of_the_pack_behind(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database)
    before = await catalog(empty_database, SCHEMAS)
    await folders.apply(empty_database, "shop")
    report = await folders.rollback(empty_database, "shop")
    assert ["shop: shop_0002 -> nothing"] == [str(move) for move in report.moves]
    assert before == await catalog(empty_database, SCHEMAS)


async def test_up_down_up_gives_the_same_catalog(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    once = await catalog(empty_database, SCHEMAS)
    await folders.rollback(empty_database, "shop")
    await folders.apply(empty_database, "shop")
    assert once == await catalog(empty_database, SCHEMAS)


async def test_a_rollback_stops_at_the_given_revision(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    report = await folders.rollback(empty_database, "shop", to="shop_0001")
    assert ["shop: shop_0002 -> shop_0001"] == [str(move) for move in report.moves]
    assert await value(empty_database, "select to_regclass('shop.goods') is not null")
    assert await value(empty_database, "select to_regclass('shop.names') is null")
    assert "shop_0001" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_rollback_to_the_current_revision_or_of_nothing_changes_nothing(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    assert not (await folders.rollback(empty_database, "shop")).changed
    await folders.apply(empty_database, "shop")
    assert not (await folders.rollback(empty_database, "shop", to="shop_0002")).changed
    assert ["shop: already at nothing", "shop: already at shop_0002"] == [folders.reported[0], folders.reported[-1]]


async def test_a_rollback_to_a_later_revision_is_refused(folders: Folders, empty_database: str) -> None:
    folders.revision("shop", 1, up="create table shop.goods ();")
    await folders.apply(empty_database, "shop")
    folders.revision("shop", 2, up="create table shop.more ();")
    with pytest.raises(RevisionNotReached, match="Schema shop is at shop_0001, before shop_0002"):
        await folders.rollback(empty_database, "shop", to="shop_0002")


async def test_unknown_packs_and_revisions_are_refused_with_a_list(folders: Folders, empty_database: str) -> None:
    folders.shop()
    with pytest.raises(UnknownPack, match="choose among rowcast, shop"):
        await folders.rollback(empty_database, "shoe")
    with pytest.raises(UnknownRevision, match="choose among shop_0001, shop_0002"):
        await folders.rollback(empty_database, "shop", to="0001")


async def test_without_a_down_file_nothing_is_rolled_back(folders: Folders, empty_database: str) -> None:
    folders.shop()
    (folders.ddl / "shop" / "0001_part.down.sql").unlink()
    await folders.apply(empty_database, "shop")
    before = await catalog(empty_database, SCHEMAS)
    with pytest.raises(IrreversibleRevision, match=r"shop_0001 .* there is no shop/0001_part\.down\.sql") as caught:
        await folders.rollback(empty_database, "shop")
    assert 23 == caught.value.exit_code
    assert before == await catalog(empty_database, SCHEMAS)


async def test_a_failing_down_file_keeps_its_revision(folders: Folders, empty_database: str) -> None:
    folders.shop()
    folders.revision("shop", 3, up="create table shop.more ();", down="drop table shop.more; select 1 / 0;")
    await folders.apply(empty_database, "shop")
    before = await catalog(empty_database, SCHEMAS)
    with pytest.raises(DatabaseFault, match="division by zero"):
        await folders.rollback(empty_database, "shop")
    assert before == await catalog(empty_database, SCHEMAS)
    assert "shop_0003" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_dependent_object_stops_the_rollback_and_is_reported(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "create view public.mine as select id from shop.goods")
    with pytest.raises(DependentObjects, match=r"view public\.mine depends on table shop\.goods") as caught:
        await folders.rollback(empty_database, "shop")
    assert 25 == caught.value.exit_code
    assert await value(empty_database, "select to_regclass('shop.goods') is not null")


async def test_a_rollback_that_fails_at_its_last_revision_undoes_nothing(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    (folders.triggers / "shop.sql").write_text("create or replace function shop.f() returns int return 1;")
    (folders.triggers / "shop.down.sql").write_text("drop function shop.f();")
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "create view public.mine as select id from shop.goods")
    before = await catalog(empty_database, SCHEMAS)
    with pytest.raises(DependentObjects):
        await folders.rollback(empty_database, "shop")
    assert before == await catalog(empty_database, SCHEMAS)
    assert "shop_0002" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_down_file_without_a_transaction_splits_the_rollback_and_the_report_says_so(
    folders: Folders, empty_database: str
) -> None:
    folders.revision("shop", 1, up="create table shop.goods (id int);", down="drop table shop.goods;")
    folders.revision("shop", 2, up="create table shop.kept ();", down="drop table shop.kept;")
    folders.revision(
        "shop",
        3,
        up="create index goods_id on shop.goods (id);",
        down="-- no-transaction\ndrop index concurrently if exists shop.goods_id;",
    )
    folders.revision("shop", 4, up="create table shop.more ();", down="drop table shop.more;")
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "create view public.mine as select id from shop.goods")
    folders.reported.clear()
    with pytest.raises(DependentObjects):
        await folders.rollback(empty_database, "shop")
    assert [
        "rolling back shop_0004, as step 1 of 3: earlier steps stay undone if a later one fails",
        "rolling back shop_0003, as step 2 of 3: earlier steps stay undone if a later one fails",
        "rolling back shop_0002, shop_0001, as step 3 of 3: earlier steps stay undone if a later one fails",
    ] == folders.reported
    assert "shop_0002" == await value(empty_database, "select version_num from shop.alembic_version")
    assert await value(empty_database, "select to_regclass('shop.kept') is not null")
    await execute(empty_database, "drop view public.mine")
    await folders.rollback(empty_database, "shop")
    assert await value(empty_database, "select to_regnamespace('shop') is null")


async def test_a_schema_that_existed_before_is_kept(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await execute(empty_database, "create schema shop")
    await folders.apply(empty_database)
    before = await catalog(empty_database, SCHEMAS)
    await folders.apply(empty_database, "shop")
    await folders.rollback(empty_database, "shop")
    assert before == await catalog(empty_database, SCHEMAS)


async def test_a_schema_with_other_objects_is_kept_with_a_warning(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    await execute(empty_database, "create table shop.mine ()")
    await folders.rollback(empty_database, "shop")
    assert "warning: schema shop is kept: it contains objects that Rowcast did not create" in folders.reported
    assert await value(empty_database, "select to_regclass('shop.mine') is not null")
    assert await value(empty_database, "select to_regclass('shop.alembic_version') is null")


async def test_a_pack_in_another_schema_is_rolled_back_there(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop")
    before = await catalog(empty_database, SCHEMAS)
    await folders.apply(empty_database, "shop", schemas={"shop": "test"})
    await folders.rollback(empty_database, "shop", schema="test")
    assert before == await catalog(empty_database, SCHEMAS)


async def test_the_trigger_down_file_runs_before_the_revisions_are_rolled_back(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    (folders.triggers / "shop.sql").write_text(
        "create or replace function shop.first(shop.goods) returns int language sql as 'select $1.id';"
    )
    (folders.triggers / "shop.down.sql").write_text("drop function shop.first(shop.goods);")
    await folders.apply(empty_database)
    before = await catalog(empty_database, SCHEMAS)
    await folders.apply(empty_database, "shop")
    await folders.rollback(empty_database, "shop")
    assert before == await catalog(empty_database, SCHEMAS)


async def with_a_third_revision(folders: Folders, dsn: str, down: str) -> None:
    """Apply the shop with a table of parts and their goods, whose down file is `down`."""
    folders.shop()
    up = "create table shop.parts (id int primary key, goods int references shop.goods);"
    folders.revision("shop", 3, up=up, down="drop table shop.parts;")
    folders.revision("shop", 4, up="create table shop.more ();", down=f"drop table shop.more; {down}")
    await folders.apply(dsn, "shop")
    await execute(dsn, "insert into shop.goods values (1, 'tea'), (2, 'milk'); insert into shop.parts values (1, 1)")


@pytest.mark.parametrize(
    ("down", "problem"),
    [
        (
            "alter table shop.goods disable trigger all; delete from shop.goods where id = 1;"
            " alter table shop.goods enable trigger all;",
            "shop.parts: 1 rows refer to none, against parts_goods_fkey",
        ),
        ("drop view shop.names;", "view shop.names: it is missing: "),
        (
            "alter table shop.goods add constraint dear check (id > 0) not valid;",
            "shop.goods: its constraint dear is not validated",
        ),
    ],
    ids=["orphans", "a missing view", "an unvalidated constraint"],
)
async def test_a_rollback_whose_result_is_not_that_of_its_revision_changes_nothing(
    folders: Folders, empty_database: str, down: str, problem: str
) -> None:
    await with_a_third_revision(folders, empty_database, down)
    before = await catalog(empty_database, SCHEMAS), await contents(empty_database, "shop")
    with pytest.raises(VerificationFailed) as caught:
        await folders.rollback(empty_database, "shop", to="shop_0003")
    assert 46 == caught.value.exit_code
    assert str(caught.value).startswith("The verification found ")
    assert problem in str(caught.value)
    assert str(caught.value).endswith(": nothing was changed. Mend that, then try again.")
    assert before == (await catalog(empty_database, SCHEMAS), await contents(empty_database, "shop"))
    assert "shop_0004" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_rollback_that_leaves_an_object_of_the_files_behind_changes_nothing(
    folders: Folders, empty_database: str
) -> None:
    folders.revision("shop", 1, up="create table shop.goods (id int); create view shop.ids as select 1 as id;",
                     down="drop table shop.goods;")  # fmt: skip
    await execute(empty_database, "create schema shop")
    await folders.apply(empty_database, "shop")
    with pytest.raises(VerificationFailed, match=r"view shop\.ids: it is still there"):
        await folders.rollback(empty_database, "shop")
    assert "shop_0001" == await value(empty_database, "select version_num from shop.alembic_version")
    await folders.rollback(empty_database, "shop", verify=False)
    assert await value(empty_database, "select to_regclass('shop.alembic_version') is null")


async def test_a_rollback_reports_the_rows_that_it_deletes(folders: Folders, empty_database: str) -> None:
    await with_a_third_revision(folders, empty_database, "delete from shop.parts;")
    await folders.rollback(empty_database, "shop", to="shop_0003")
    assert [
        "shop.parts: 1 rows before, 0 after (0 inserted and 1 deleted by this change)",
        "shop: shop_0004 -> shop_0003",
    ] == folders.reported[-2:]


async def test_a_problem_that_was_there_before_does_not_stop_a_rollback(
    folders: Folders, empty_database: str
) -> None:
    await with_a_third_revision(folders, empty_database, "")
    await execute(empty_database, "drop view shop.names")
    await folders.rollback(empty_database, "shop", to="shop_0003")
    assert [line for line in folders.reported if line.startswith("warning: view shop.names: it is missing")]
    assert "shop_0003" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_role_that_may_not_create_schemas_upgrades_and_rolls_back_without_the_comparison(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    await execute(
        empty_database,
        "create role tenant login password 'tenant'; create schema rowcast authorization tenant;"
        " create schema shop authorization tenant;",
    )
    tenant = re.sub("//[^@]+@", "//tenant:tenant@", empty_database)
    await folders.upgrade(tenant, "shop")
    await folders.rollback(tenant, "shop")
    warning = "warning: the schemas: they were not compared: this role may not build them anew"
    assert [line for line in folders.reported if line.startswith(warning)]
    assert await value(empty_database, "select to_regclass('shop.goods') is null")
    await execute(empty_database, "drop owned by tenant; drop role tenant")


async def test_a_rollback_that_ends_outside_a_transaction_is_verified_too(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    folders.revision("shop", 3, up="select 1;", down="-- no-transaction\ndrop index concurrently shop.goods_name;")
    await folders.apply(empty_database, "shop")
    with pytest.raises(
        VerificationFailed, match=r"index shop\.goods_name: it is missing.*: shop stays at shop_0002\."
    ):
        await folders.rollback(empty_database, "shop", to="shop_0002")
    assert "shop_0002" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_rowcasts_own_schema_is_kept_while_a_pack_uses_it(folders: Folders, empty_database: str) -> None:
    folders.shop()
    await folders.apply(empty_database, "shop", schemas={"shop": "test"})
    with pytest.raises(SchemaInUse, match=r"still used by shop \(schema test\)") as caught:
        await folders.rollback(empty_database, "rowcast")
    assert 24 == caught.value.exit_code
    await folders.rollback(empty_database, "shop", schema="test")
    await folders.rollback(empty_database, "rowcast")
    assert {"schema public"} == {name for name in await catalog(empty_database, SCHEMAS) if name.startswith("schema")}


async def test_the_history_of_another_application_does_not_keep_rowcasts_schema(
    folders: Folders, empty_database: str
) -> None:
    await execute(
        empty_database,
        "create table public.alembic_version (version_num text);"
        "insert into public.alembic_version values ('ae1027a6acf');",
    )
    await folders.apply(empty_database)
    await folders.rollback(empty_database, "rowcast")
    assert await value(empty_database, "select to_regnamespace('rowcast') is null")
