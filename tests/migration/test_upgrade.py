"""Upgrading: everything that is pending at once, tried first, verified, and undone as a whole."""

import pytest

from daemon.core.errors import OperatorFault
from daemon.postgres.errors import DatabaseFault
from daemon.schema import migrate
from daemon.schema.migrate import NotRestored
from daemon.schema.verify import VerificationFailed
from tests.support.catalog import catalog, contents
from tests.support.folders import Folders, execute, value
from tests.support.postgres import ignore

SCHEMAS = ("rowcast", "shop")
PARTS = """
create table shop.parts (
    id int primary key, goods int not null references shop.goods deferrable initially deferred
);
"""
ROWS = "insert into shop.goods values (1, 'tea'), (2, 'milk'); insert into shop.parts values (1, 1), (2, 2);"
ORPHANS = """
alter table shop.goods disable trigger all;
delete from shop.goods where id = 2;
alter table shop.goods enable trigger all;
"""


async def state(dsn: str) -> tuple[object, ...]:
    """The catalog, the rows, and the revision."""
    revision = await value(dsn, "select version_num from shop.alembic_version")
    return await catalog(dsn, SCHEMAS), await contents(dsn, "shop"), revision


@pytest.fixture
async def shop(folders: Folders, empty_database: str) -> str:
    """The DSN of a database with the pack `shop` at its third revision, and rows."""
    folders.shop()
    folders.revision("shop", 3, up=PARTS, down="drop table shop.parts;")
    await folders.apply(empty_database, "shop")
    await execute(empty_database, ROWS)
    folders.reported.clear()
    return empty_database


async def test_an_upgrade_backs_up_tries_applies_and_verifies_in_this_order(folders: Folders, shop: str) -> None:
    folders.revision("shop", 4, up="alter table shop.goods add column price int;")
    folders.revision("shop", 5, up="create index goods_price on shop.goods (price);")
    order: list[object] = []

    async def back_up() -> None:
        order.append(await value(shop, "select version_num from shop.alembic_version"))

    await folders.upgrade(shop, "shop", report=order.append, back_up=back_up)
    assert [
        "pending: shop: shop_0003 -> shop_0005",
        "shop_0003",
        "dry run: everything that is pending, in a transaction that is rolled back",
        "dry run: passed",
        "applying the captures of rowcast, shop_0004, shop_0005, the captures of shop",
        "rowcast: already at rowcast_0001",
        "shop: shop_0003 -> shop_0005",
    ] == order


async def test_an_upgrade_of_an_empty_database_makes_what_an_apply_makes(
    folders: Folders, empty_database: str
) -> None:
    folders.shop()
    await folders.upgrade(empty_database, "shop")
    upgraded = await catalog(empty_database, SCHEMAS)
    await folders.rollback(empty_database, "shop")
    await folders.apply(empty_database, "shop")
    assert upgraded == await catalog(empty_database, SCHEMAS)


async def test_if_nothing_is_pending_no_backup_is_made(folders: Folders, shop: str) -> None:
    async def back_up() -> None:
        raise AssertionError

    assert not (await folders.upgrade(shop, "shop", back_up=back_up)).changed
    assert "nothing is pending: every schema is at its newest revision" == folders.reported[0]


async def test_a_dry_run_shows_the_error_and_changes_nothing(folders: Folders, shop: str) -> None:
    before = await state(shop)
    folders.revision("shop", 4, up="alter table shop.goods add column price int;")
    assert () == (await folders.upgrade(shop, "shop", dry_run=True)).moves
    assert "dry run: passed" == folders.reported[-1]
    folders.revision("shop", 5, up="update shop.goods set price = 1; select 1 / 0;")
    with pytest.raises(DatabaseFault, match="division by zero"):
        await folders.upgrade(shop, "shop", dry_run=True)
    assert before == await state(shop)


async def test_if_the_second_revision_fails_the_first_is_undone_too(folders: Folders, shop: str) -> None:
    before = await state(shop)
    folders.revision("shop", 4, up="alter table shop.goods add column price int; delete from shop.parts;")
    folders.revision("shop", 5, up="update shop.goods set price = 1;\nselect price / 0 from shop.goods;")
    with pytest.raises(DatabaseFault, match=r"division by zero") as caught:
        await folders.upgrade(shop, "shop")
    assert "\n" not in str(caught.value)
    assert before == await state(shop)
    folders.revision("shop", 5, up="update shop.goods set price = 1;")
    await folders.upgrade(shop, "shop")
    assert "shop.parts: 2 rows before, 0 after (0 inserted and 2 deleted by this change)" in folders.reported


@pytest.mark.parametrize(
    ("up", "problem"),
    [
        (ORPHANS, "shop.parts: 1 rows refer to none, against parts_goods_fkey"),
        (
            "alter table shop.goods add constraint dear check (id > 1) not valid;",
            "shop.goods: its constraint dear is not validated",
        ),
        (
            "do $$ begin if exists (select from shop.goods) then drop index shop.goods_name; end if; end $$;",
            "index shop.goods_name: it is missing: CREATE INDEX goods_name ON shop.goods USING btree (name)",
        ),
    ],
    ids=["orphans", "an unvalidated constraint", "a missing index"],
)
async def test_an_upgrade_whose_result_is_not_as_it_should_be_changes_nothing(
    folders: Folders, shop: str, up: str, problem: str
) -> None:
    before = await state(shop)
    folders.revision("shop", 4, up=up)
    with pytest.raises(VerificationFailed) as caught:
        await folders.upgrade(shop, "shop")
    assert f"The verification found {problem}: nothing was changed. Mend that, then try again." == str(caught.value)
    assert (46, f"problem: {problem}") == (caught.value.exit_code, folders.reported[-1])
    assert before == await state(shop)


async def test_what_was_wrong_before_is_reported_and_does_not_stop_an_upgrade(folders: Folders, shop: str) -> None:
    await execute(shop, ORPHANS + "alter table shop.goods add constraint mine check (id > 0) not valid;")
    folders.revision("shop", 4, up="alter table shop.parts add column price int;")
    await folders.upgrade(shop, "shop")
    assert "shop_0004" == await value(shop, "select version_num from shop.alembic_version")
    assert "warning: shop.goods: its constraint mine is not validated (as before)" in folders.reported
    folders.revision("shop", 5, up="delete from shop.goods where false;" + ORPHANS.replace("= 2", "= 1"))
    with pytest.raises(VerificationFailed, match="2 rows refer to none") as caught:
        await folders.upgrade(shop, "shop")
    assert 1 == len(caught.value.problems)


async def test_what_one_revision_defers_is_checked_before_the_next_and_does_not_stop_it(
    folders: Folders, shop: str
) -> None:
    for number in (4, 5):
        rows = f"insert into shop.parts values ({number}, {number}); insert into shop.goods values ({number}, 'a');"
        folders.revision("shop", number, up=rows)
    folders.revision("shop", 6, up="alter table shop.parts add column price int;")
    await folders.upgrade(shop, "shop")
    assert 4 == await value(shop, "select count(*) from shop.parts")


def without_a_transaction(folders: Folders, *, down: str | None) -> None:
    """Revisions of which the second builds a unique index concurrently, which fails, and leaves it invalid."""
    folders.revision(
        "shop", 4, up="alter table shop.goods add column price int not null default 1;",
        down="alter table shop.goods drop column price;" if down else None,
    )  # fmt: skip
    folders.revision(
        "shop",
        5,
        up="-- no-transaction\ncreate unique index concurrently goods_price on shop.goods (price);",
        down=down,
    )


async def test_a_step_outside_a_transaction_that_fails_is_rolled_back_with_those_before_it(
    folders: Folders, shop: str
) -> None:
    before = await state(shop)
    without_a_transaction(folders, down="-- no-transaction\ndrop index concurrently if exists shop.goods_price;")
    with pytest.raises(
        OperatorFault, match=r"could not create unique index .goods_price. in shop/0005_part\.up\.sql"
    ):
        await folders.upgrade(shop, "shop")
    assert before == await state(shop)
    assert [
        "pending: shop: shop_0003 -> shop_0005",
        "dry run: without shop_0005, which cannot run in a transaction",
        "dry run: passed",
        "step 1 of 3: applying the captures of rowcast, shop_0004",
        "step 2 of 3: applying shop_0005",
    ] == folders.reported[:5]
    assert "shop: shop_0004 -> shop_0003" == folders.reported[-1]
    await execute(shop, "delete from shop.parts; delete from shop.goods where id = 2")
    await folders.upgrade(shop, "shop")
    assert "shop: shop_0003 -> shop_0005" == folders.reported[-1]


async def test_a_step_that_cannot_be_rolled_back_says_so_in_one_line(folders: Folders, shop: str) -> None:
    without_a_transaction(folders, down=None)
    with pytest.raises(NotRestored, match=r"Schema shop could not be rolled back \(.* there is no .*\)") as caught:
        await folders.upgrade(shop, "shop")
    assert (47, False) == (caught.value.exit_code, "\n" in str(caught.value))
    assert "shop_0004" == await value(shop, "select version_num from shop.alembic_version")


async def test_bundled_packs_are_upgraded_from_their_first_revisions_at_once(empty_database: str) -> None:
    packs = ("antone", "email_unsubscribe")  # they have the most revisions, and deferred constraints
    schemas = ("rowcast", *packs)
    await migrate.apply(empty_database, packs, report=ignore)
    once = await catalog(empty_database, schemas)
    for pack in packs:
        await migrate.rollback(empty_database, pack, report=ignore, to=f"{pack}_0001")
    lines: list[str] = []
    await migrate.upgrade(empty_database, packs, report=lines.append)
    assert not [line for line in lines if line.startswith(("warning", "problem"))]
    assert once == await catalog(empty_database, schemas)
