"""Applying while other sessions use the tables."""

import asyncio

import asyncpg
import pytest

from daemon.schema.migrate import LOCK, LockTimeout, SchemaLockHeld
from tests.support.folders import Folders, execute, value


@pytest.fixture
async def reader(folders: Folders, empty_database: str) -> asyncpg.Connection:
    """An open transaction that has read shop.goods."""
    folders.shop()
    await folders.apply(empty_database, "shop")
    folders.revision("shop", 3, up="alter table shop.goods add column price int;")
    connection = await asyncpg.connect(empty_database, server_settings={"application_name": "slow report"})
    await connection.execute("begin; select * from shop.goods;")
    folders.reported.clear()
    return connection


async def test_a_revision_that_gets_no_lock_names_the_blocker_and_changes_nothing(
    folders: Folders, empty_database: str, reader: asyncpg.Connection
) -> None:
    with pytest.raises(LockTimeout) as caught:
        await folders.apply(empty_database, "shop", lock_timeout=2.0, attempts=1)
    assert 19 == caught.value.exit_code
    message = str(caught.value)
    assert message.startswith("No lock within 2 s in shop/0003_part.up.sql, because of process ")
    assert f"process {reader.get_server_pid()} (slow report of rowcast, idle in transaction for " in message
    assert "shop_0002" == await value(empty_database, "select version_num from shop.alembic_version")
    await reader.close()


async def test_a_revision_that_got_no_lock_is_retried(
    folders: Folders, empty_database: str, reader: asyncpg.Connection
) -> None:
    blocked = asyncio.Event()

    def report(line: str) -> None:
        folders.reported.append(line)
        blocked.set()

    applying = asyncio.create_task(folders.apply(empty_database, "shop", lock_timeout=0.5, report=report))
    while "(attempt 1 failed)" not in (folders.reported or [""])[-1]:
        blocked.clear()
        await blocked.wait()
    await reader.close()
    await applying
    assert "shop: shop_0002 -> shop_0003" == folders.reported[-1]


async def test_a_cancelled_apply_leaves_nothing_and_releases_the_lock(folders: Folders, empty_database: str) -> None:
    begun = asyncio.Event()

    def report(line: str) -> None:
        if line == "notice: begun":
            begun.set()

    folders.revision(
        "shop",
        1,
        up="create table shop.goods (); do $$ begin raise notice 'begun'; perform pg_sleep(600); end $$;",
    )
    applying = asyncio.create_task(folders.apply(empty_database, "shop", report=report))
    await begun.wait()
    applying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await applying
    folders.revision("shop", 1, up="create table shop.other ();")
    await folders.apply(empty_database, "shop")
    assert await value(empty_database, "select to_regclass('shop.goods') is null")


async def test_without_a_lock_timeout_a_revision_waits_until_it_gets_its_lock(
    folders: Folders, empty_database: str, reader: asyncpg.Connection
) -> None:
    folders.revision("shop", 3, up="select 1;")
    folders.revision("shop", 4, up="do $$ begin raise notice 'begun'; end $$; alter table shop.goods add price int;")
    begun = asyncio.Event()

    def report(line: str) -> None:
        if line == "notice: begun":
            begun.set()

    applying = asyncio.create_task(folders.apply(empty_database, "shop", lock_timeout=0, report=report))
    await begun.wait()
    await reader.close()
    await applying
    assert "shop_0004" == await value(empty_database, "select version_num from shop.alembic_version")


async def test_a_stranger_who_holds_the_lock_for_changing_schemas_is_named_in_bounded_time(
    folders: Folders, empty_database: str
) -> None:
    await folders.apply(empty_database)
    await execute(empty_database, "create role idler login password 'idler'")
    idler = await asyncpg.connect(
        empty_database, user="idler", password="idler", server_settings={"application_name": "rowcast ddl"}
    )
    await idler.execute(f"select pg_advisory_lock({LOCK})")
    with pytest.raises(SchemaLockHeld) as caught:
        await folders.apply(empty_database, lock_timeout=0.3)
    assert 19 == caught.value.exit_code
    assert f"process {idler.get_server_pid()} (rowcast ddl of idler" in str(caught.value)
    await idler.close()
    await folders.apply(empty_database, lock_timeout=0.3)
    await execute(empty_database, "drop role idler")
