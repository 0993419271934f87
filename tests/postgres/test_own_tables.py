"""rowcast.serve(): tables that are served without a pack, inside the database."""

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import asyncpg
import pytest

from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.support.cases import for_each
from tests.support.postgres import Server, ignore

SHOP = """
create schema shop;
create table shop.customers (id bigint primary key, name text, user_id text, topic text);
create table shop.orders (
    id bigint generated always as identity primary key, customer_id bigint not null, user_id text, total numeric
);
create index on shop.orders (customer_id);
create table shop.lines (id uuid primary key, order_id bigint not null, total numeric);
create schema "Other";
create table "Other".orders (id bigint primary key, customer_id bigint);
create table shop.loose (customer_id bigint);
create view shop.all_orders as select * from shop.orders;
create table shop.double (id integer primary key, twice integer generated always as (id * 2) stored);
create function shop.may(user_id text, topic text) returns boolean language sql
as $$ select user_id = 'boss' $$;
"""
ORDERS = "'orders:' || r.customer_id"


@pytest.fixture
async def db(postgres: Server) -> AsyncIterator[Connection]:
    """A session with Rowcast's own schema and tables of a shop, in a transaction that is rolled back."""
    async with postgres.undone("own", partial(migrate.apply, packs=(), report=ignore)) as connection:
        await connection.execute(SHOP)
        yield connection


async def serve(db: Connection, table: str, topic: str, readable: str, **more: object) -> dict[str, Any]:
    names = "".join(f", {name} => ${place}" for place, name in enumerate(more, 4))
    text = await db.fetchval(
        f"select rowcast.serve($1::text::regclass, $2, $3{names})", table, topic, readable, *more.values()
    )
    answer: dict[str, Any] = json.loads(text)
    return answer


async def may_read(db: Connection, user: str, topic: str) -> object:
    return await db.fetchval("select rowcast.may_read($1, $2)", user, topic)


async def test_a_right_over_rows_needs_a_row_of_the_topic(db: Connection) -> None:
    await db.execute("insert into shop.orders (customer_id) values (1)")
    answer = await serve(db, "shop.orders", ORDERS, "user_id = r.customer_id::text")
    assert ["orders:*"] == answer["topics"]
    assert ["id", "customer_id", "user_id", "total"] == answer["columns"]
    assert None is answer["unindexed"]
    cases = {("1", "orders:1"): True, ("2", "orders:1"): False, ("2", "orders:2"): False, ("1", "orders:x"): False,
             ("1", "orders:99999999999999999999"): False, ("1", "other:1"): False}  # fmt: skip
    assert cases == {case: await may_read(db, *case) for case in cases}


async def test_a_right_may_read_columns_that_are_not_published(db: Connection) -> None:
    await db.execute("insert into shop.customers values (1, 'a', 'owner', 'x')")
    await serve(db, "shop.customers", "'c:' || r.id", "user_id = r.user_id", columns=["id"])
    assert await may_read(db, "owner", "c:1")
    assert not await may_read(db, "x", "c:1")


async def test_a_right_over_the_topic_alone_needs_no_row(db: Connection) -> None:
    await serve(db, "shop.orders", ORDERS, "topic = 'orders:' || user_id")
    assert await may_read(db, "1", "orders:1")
    assert not await may_read(db, "2", "orders:1")


async def test_user_and_topic_are_not_columns_of_the_table(db: Connection) -> None:
    await db.execute("insert into shop.customers values (1, 'a', 'owner', 'x')")
    await serve(db, "shop.customers", "'c:' || r.id", "user_id = r.user_id and topic = 'c:' || r.id")
    assert await may_read(db, "owner", "c:1")
    assert not await may_read(db, "somebody", "c:1")


async def test_a_function_and_everybody_are_rights_too(db: Connection) -> None:
    await db.execute("grant usage on schema shop to rowcast_capture")
    await serve(db, "shop.orders", ORDERS, "shop.may(user_id, topic)")
    await serve(db, "shop.lines", "'lines'", "true")
    cases = {("boss", "orders:1"): True, ("1", "orders:1"): False, ("1", "lines"): True, ("1", "lines:1"): False}
    assert cases == {case: await may_read(db, *case) for case in cases}


async def test_an_expression_that_fails_for_a_user_says_no(db: Connection) -> None:
    await serve(db, "shop.orders", ORDERS, "topic = 'orders:' || user_id::bigint")
    assert await may_read(db, "1", "orders:1")
    assert not await may_read(db, "x", "orders:1")
    await db.execute("""
        create function shop.known(user_id text) returns boolean language plpgsql as $$
        begin
            if user_id = '1' then return true; end if;
            raise exception 'there is no user %', user_id;
        end $$;
        grant usage on schema shop to rowcast_capture;
    """)
    await serve(db, "shop.orders", ORDERS, "shop.known(user_id)")
    assert await may_read(db, "1", "orders:1")
    assert not await may_read(db, "x", "orders:1")
    await serve(db, "shop.orders", ORDERS, "user_id = (select n::text from generate_series(1, 2) as n)")
    assert not await may_read(db, "1", "orders:1")


async def test_the_rows_of_a_topic_are_found_by_index(db: Connection) -> None:
    answer = await serve(db, "shop.orders", ORDERS, "true")
    await db.execute("insert into shop.orders (customer_id) select n % 1000 from generate_series(1, 20000) as n")
    await db.execute("analyze shop.orders")
    condition = answer["rows"].replace("$1", "'orders:7'")
    plan = await db.fetch(f"explain select from shop.orders as r where {condition}")
    assert any("Index Cond" in row[0] for row in plan), plan
    unindexed = await serve(db, "shop.lines", "'order:' || r.order_id", "true")
    assert "order_id" == unindexed["unindexed"]
    whole = await serve(db, "shop.customers", "'c:' || r.id || r.name", "true")
    assert None is whole["rows"]


async def test_a_right_over_rows_is_found_by_the_index_of_the_topic(db: Connection) -> None:
    await serve(db, "shop.orders", ORDERS, "user_id = r.customer_id::text")
    await db.execute("insert into shop.orders (customer_id) select n from generate_series(1, 20000) as n")
    await db.execute("analyze shop.orders")
    body = await db.fetchval("select p.prosrc from pg_catalog.pg_proc as p where p.proname like 'may\\_read\\_%'")
    await db.execute(f"prepare may_read (text, text) as {body}; set local plan_cache_mode = force_generic_plan")
    plan = [row[0] for row in await db.fetch("explain execute may_read ('orders:7', '7')")]
    await db.execute("deallocate may_read")
    assert any("Index Cond" in line for line in plan), plan


async def test_unwatching_stops_serving_and_watching_again_replaces(db: Connection) -> None:
    await serve(db, "shop.orders", ORDERS, "true")
    await serve(db, "shop.orders", "'sales:' || r.customer_id", "true", columns=["id"])
    cases = {("1", "orders:1"): False, ("1", "sales:1"): True}
    assert cases == {case: await may_read(db, *case) for case in cases}
    await db.execute("select rowcast.unwatch('shop.orders')")
    assert not await may_read(db, "1", "sales:1")
    left = "select count(*) from pg_catalog.pg_proc where proname like 'may\\_read\\_%'"
    assert 0 == await db.fetchval(left)
    assert 0 == await db.fetchval("select count(*) from rowcast.own_tables")


@for_each(
    ("message", "table", "topic", "readable", "more"),
    [
        ("is not an ordinary or partitioned table", "shop.all_orders", ORDERS, "true", {}),
        ("has no primary key", "shop.loose", "'x:' || r.customer_id", "true", {}),
        ('column "orders" does not exist', "shop.lines", "orders", "true", {"topics": ["a"]}),
        (
            "(r.nothing || ''): column r.nothing does not exist",
            "shop.lines",
            "r.nothing || ''",
            "true",
            {"topics": ["a"]},
        ),
        ("cast what you compare", "shop.lines", "'a'", "user_id = r.id", {}),
        ("every row would count as deleted", "shop.lines", "'a'", "true", {"soft_delete": "id"}),
        ("a text needs quotes of its own", "shop.lines", "orders:r.id", "true", {}),
        ("names no column", "shop.lines", "'a' || 'b'", "true", {}),
        ("how the topics", "shop.lines", "r.id::text", "true", {}),
        ("begins with at least one", "shop.lines", "r.id::text", "true", {"topics": ["*"]}),
        ("no client can name", "shop.lines", "'of a line:' || r.id", "true", {}),
        ("no client can name", "shop.lines", f"'{'x' * 129}'", "true", {}),
        ("a topic is text", "shop.lines", "r.total", "true", {"topics": ["a"]}),
        ("has no column nothing", "shop.lines", "'a'", "true", {"columns": ["nothing"]}),
        ("cannot be worked out (r.nothing)", "shop.lines", "'a'", "r.nothing", {}),
        ("cannot be worked out (5)", "shop.lines", "'a'", "5", {}),
        ("cannot be worked out (user_id =)", "shop.lines", "'a'", "user_id =", {}),
        ("tables of one name", '"Other".orders', ORDERS, "true", {}),
        ("another right decides", "shop.lines", "'orders:' || r.order_id", "false", {}),
    ],
)
async def test_what_cannot_be_served_is_refused_in_one_sentence(
    db: Connection, message: str, table: str, topic: str, readable: str, more: dict[str, object]
) -> None:
    await serve(db, "shop.orders", ORDERS, "true")
    with pytest.raises(asyncpg.PostgresError) as caught:
        await serve(db, table, topic, readable, **more)
    assert message in str(caught.value)


async def test_applying_again_renews_what_is_served(db: Connection) -> None:
    await serve(db, "shop.orders", ORDERS, "topic = 'orders:' || user_id")
    watch, since = await db.fetchval("select row(watch, since) from rowcast.own_tables")
    await db.execute(f"drop function rowcast.may_read_{watch}(text, text)")
    await db.execute("select rowcast.serve_again()")
    assert await may_read(db, "1", "orders:1")
    assert since == await db.fetchval("select since from rowcast.own_tables")
