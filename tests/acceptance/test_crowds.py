"""Crowds at the door of a daemon with few descriptors: peers that want a connection and nothing else."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from tests.acceptance.chat import Chat
from tests.gateway.peers import UPGRADE, request
from tests.support.daemon import Daemon, get, token
from tests.support.gateways import PLACES, node

CROWD = 260  # more than there are descriptors
Peer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, object]]


async def says_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def sends_a_request_without_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"GET /healthz HTTP/1.1\r\nX-Header: ")
    while not writer.is_closing():
        writer.write(b"x")
        await asyncio.sleep(0.2)


async def never_closes_a_page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(request("GET /healthz"))
    await reader.readuntil(b"ok")
    await reader.read()  # the end of the answer
    await asyncio.Event().wait()


async def never_says_hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(request("GET /v1", UPGRADE))
    await reader.read()


@asynccontextmanager
async def crowd(daemon: Daemon, peer: Peer) -> AsyncIterator[None]:
    """CROWD peers. Each comes again some time after it was disconnected."""
    arrivals = 0
    everybody_came = asyncio.Event()

    async def come_again(number: int) -> None:
        nonlocal arrivals
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                reader, writer = await asyncio.open_connection(*daemon.address)
                arrivals += 1
                if arrivals == CROWD:
                    everybody_came.set()
                try:
                    await peer(reader, writer)
                finally:
                    writer.close()
            await asyncio.sleep(2 + number / CROWD)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(come_again(number)) for number in range(CROWD)]
        await everybody_came.wait()
        yield
        for task in tasks:
            task.cancel()


async def metric(url: str, name: str) -> float:
    """The value of one sample of a page of metrics."""
    found = re.search(rf"^{re.escape(name)} (\S+)$", (await get(url))[1], re.MULTILINE)
    assert found, name
    return float(found[1])


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@asynccontextmanager
async def with_few_files(place: str, database: str, **environment: str) -> AsyncIterator[tuple[Daemon, str]]:
    """A node with 256 descriptors, and the URL of its metrics."""
    module = "tests.acceptance.few_files"
    own = {"ROWCAST_METRICS_LISTEN": "127.0.0.1:0", **environment}
    async with node(place, database, module=module, environment=own) as daemon:
        [url] = [line["data"]["metrics"] for line in daemon.events() if line["event"] == "serving"]
        yield daemon, url


@pytest.mark.parametrize("peer", [says_nothing, sends_a_request_without_end, never_closes_a_page, never_says_hello])
async def test_a_crowd_from_one_address_keeps_nobody_out_and_disturbs_no_client(
    place: str, database: str, chat: Chat, peer: Peer
) -> None:
    async with with_few_files(place, database) as (daemon, metrics), daemon.client(chat.ada) as before:
        await before.subscribe(chat.topic)
        async with crowd(daemon, peer):
            assert 200 == (await get(f"{daemon.http}/healthz"))[0]
            assert 200 == (await get(metrics.replace("/metrics", "/healthz")))[0]
            assert await metric(metrics, 'rowcast_refused_total{reason="crowded"}') > 0
            assert await metric(metrics, "rowcast_unauthenticated") <= 40
            async with daemon.client(chat.ada) as newcomer:
                await newcomer.subscribe(chat.topic)
                await chat.say("to both")
                for client in (before, newcomer):
                    assert "to both" == (await client.changes())[0]["record"]["content"]
        assert await metric(metrics, 'rowcast_refused_total{reason="files"}') == 0


async def test_the_daemon_reaches_its_database_while_every_connection_is_taken(
    place: str, database: str, chat: Chat
) -> None:
    async with with_few_files(place, database) as (daemon, metrics), daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        async with crowd(daemon, never_says_hello):
            await chat.sql.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where application_name like 'rowcast%' "
                "and datname = current_database()"
            )
            await chat.say("after all connections were lost")
            assert "after all connections were lost" == (await client.changes())[0]["record"]["content"]
        assert await metric(metrics, 'rowcast_refused_total{reason="files"}') == 0
        reasons = [line["data"].get("reason", "") for line in daemon.events()]
        assert not [reason for reason in reasons if "EMFILE" in str(reason) or "Too many open files" in str(reason)]


async def test_a_user_with_too_many_connections_keeps_no_other_user_out(
    place: str, database: str, chat: Chat
) -> None:
    async with with_few_files(place, database, ROWCAST_MAX_CLIENTS_PER_USER="2") as (daemon, metrics):
        async with daemon.client(chat.ada), daemon.client(chat.ada), daemon.raw() as third:
            await third.say(op="hello", token=token(chat.ada))
            error = await third.next()
            assert ("too_many_connections", True) == (error["code"], error["retry"])
            assert 4409 == (await third.closed())[0]
            async with daemon.client(chat.bob):
                assert 3 == await metric(metrics, "rowcast_clients")
        assert 1 == await metric(metrics, 'rowcast_refused_total{reason="user"}')


async def test_pages_are_served_while_every_client_has_its_place(place: str, database: str, chat: Chat) -> None:
    async with with_few_files(place, database, ROWCAST_MAX_CLIENTS="1") as (daemon, metrics), daemon.client(chat.ada):
        async with crowd(daemon, never_closes_a_page):
            reader, writer = await asyncio.open_connection(*daemon.address)
            writer.write(request("GET /v1", UPGRADE))
            assert (await reader.read()).startswith(b"HTTP/1.1 503 ")
            writer.close()
            assert 200 == (await get(f"{daemon.http}/readyz"))[0]
        assert 1 == await metric(metrics, "rowcast_clients_limit")
