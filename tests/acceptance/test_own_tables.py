"""Tables without a pack: watched from the command line, served by daemons that run."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from daemon.postgres.connect import Connection
from daemon.schema import migrate
from tests.support.daemon import Client, Daemon, Frame, command, daemon_process, get
from tests.support.postgres import Server, ignore

TABLES = """
create table public.orders (
    id bigint generated always as identity primary key,
    customer_id bigint not null, status text not null default 'new', total numeric(10, 2), note text, gone_at timestamptz
);
create index on public.orders (customer_id);
create table public.lines (id bigint primary key, customer_id bigint not null);
"""
WATCH = ("watch", "public.orders", "--topic", "'orders:' || r.customer_id")
BY_TOPIC = ("--read", "topic = 'orders:' || user_id")


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    """A database with Rowcast's own schema, and no pack."""
    template = await postgres.template("rowcast", partial(migrate.apply, packs=(), report=ignore))
    async with postgres.database(template) as dsn:
        yield dsn


@pytest.fixture(scope="module")
async def daemon(database: str) -> AsyncIterator[Daemon]:
    async with daemon_process(database, environment={"ROWCAST_PACKS": "none"}) as process:
        yield process


@pytest.fixture
async def tables(database: str, sql: Connection) -> AsyncIterator[Connection]:
    await sql.execute(TABLES)
    yield sql
    await sql.execute("drop table public.orders, public.lines; select rowcast.unwatch_dropped()")


async def rowcast(database: str, *arguments: str, code: int = 0) -> str:
    """The output of a command that ends with this code; its one line of errors if that is not 0."""
    found, output, errors = await command(*arguments, DATABASE_URL=database, ROWCAST_PACKS="none")
    assert (code, bool(code)) == (found, bool(errors)), errors
    return errors if code else output


async def followed(client: Client, topic: str, **members: object) -> Frame:
    """The answer to a subscribe that succeeds, as soon as the daemon knows the table."""
    async with asyncio.timeout(5):
        while (answer := await client.subscribe(topic, **members))["op"] == "error":
            assert "no_such_topic" == answer["code"]
            await asyncio.sleep(0.05)
    return answer


async def test_a_running_daemon_serves_a_table_once_it_is_watched(
    database: str, daemon: Daemon, tables: Connection
) -> None:
    async with daemon.client("7") as reader, daemon.client("8") as stranger:
        assert "no_such_topic" == (await reader.subscribe("orders:7"))["code"]
        output = await rowcast(database, *WATCH, *BY_TOPIC, "--columns", "id,status,total")
        assert "left out    customer_id, note, gone_at" in output
        await followed(reader, "orders:7")
        assert "no_such_topic" == (await stranger.subscribe("orders:7"))["code"]
        await tables.execute("insert into public.orders (customer_id, total) values (7, 1.50), (8, 2)")
        [change] = await reader.changes()
        assert ("insert", "orders", "orders:7") == (change["kind"], change["table"], change.get("topic", "orders:7"))
        assert {"status": "new", "total": 1.5} == {name: change["record"][name] for name in ("status", "total")}
        assert 3 == len(change["record"])
    assert [] == daemon.warnings()
