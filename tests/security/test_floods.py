"""Floods of a real daemon: what holds them up, and that clients and /healthz do not notice. Nothing here is timed."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
from websockets.exceptions import ConnectionClosed

from bench.flooder import Given
from bench.load import tool
from bench.rig import python
from daemon.postgres.connect import Connection
from daemon.postgres.connect import connect as connect_to_database
from tests.acceptance.chat import EMPTY, Chat
from tests.support.daemon import Daemon, get, token
from tests.support.gateways import PLACES, node

ROWS = 40  # during a flood
UNITS = 60  # of a flood, at least


@pytest.fixture(scope="module", params=PLACES)
async def daemon(request: pytest.FixtureRequest, dsn: str) -> AsyncIterator[Daemon]:
    async with node(request.param, dsn) as process:
        yield process


@pytest.fixture
async def chat(dsn: str) -> AsyncIterator[Chat]:
    sql: Connection = await connect_to_database(dsn, application_name="test")
    await sql.execute(EMPTY)
    yield await Chat.begin(sql)
    await sql.close()


async def counters(daemon: Daemon) -> dict[str, float]:
    page = (await get(f"{daemon.http}/metrics"))[1]
    return {name: float(value) for name, value in re.findall(r"^(rowcast_\S+_total\S*) (\S+)$", page, re.MULTILINE)}


@asynccontextmanager
async def flood(daemon: Daemon, kind: str, connections: int, **more: str) -> AsyncIterator[None]:
    """Flood the daemon, from before the block until it ends and this many units have been sent."""
    given = Given(
        kind=kind,
        connections=connections,
        rate=0,
        port=daemon.address[1],
        token="",
        since="",
        topic="",
        certificate="",
        key="",
    )
    async with tool(*python("bench.flooder")) as flooder:
        await flooder.send(json.dumps({**given, **more}))
        await flooder.receive()
        await flooder.send("go")
        await flooder.receive()
        yield
        done = 0
        while done < UNITS:
            await get(f"{daemon.http}/healthz")
            await flooder.send("mark")
            done = (await flooder.receive())["done"]


@pytest.mark.parametrize(
    ("kind", "connections", "counter"),
    [
        ("ping", 4, "rowcast_throttled_total"),
        ("nested", 4, 'rowcast_errors_total{code="bad_frame"}'),
        ("subscribe", 4, 'rowcast_errors_total{code="no_such_topic"}'),
        ("replay", 40, "rowcast_connected_total"),
    ],
)
async def test_a_flood_of_one_user_delays_nobody_elses_frames(
    daemon: Daemon, chat: Chat, kind: str, connections: int, counter: str
) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        await chat.say("before")
        since = f"{client.welcome['pos'].rpartition(':')[0]}:0"
        assert "before" == (await client.changes())[0]["record"]["content"]
        before = await counters(daemon)
        flooded = flood(daemon, kind, connections, token=token(chat.bob), since=since, topic=chat.topic)
        async with flooded:
            for number in range(ROWS):
                await chat.say(f"{number}")
                assert f"{number}" == (await client.changes())[0]["record"]["content"]
            assert 200 == (await get(f"{daemon.http}/healthz"))[0]
            await client.say(op="ping")
            assert "pong" == (await client.next())["op"]
        after = await counters(daemon)
    assert after[counter] > before.get(counter, 0)
    if kind in {"ping", "nested"}:
        assert after["rowcast_throttled_total"] > before["rowcast_throttled_total"]


async def test_a_flood_of_forged_tokens_delays_newcomers_only(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic)
        before = await counters(daemon)
        async with flood(daemon, "token", 16, token=token(chat.bob)):
            held_up = before["rowcast_held_up_total"]
            while held_up == before["rowcast_held_up_total"]:
                await chat.say("in between")
                assert "in between" == (await client.changes())[0]["record"]["content"]
                held_up = (await counters(daemon))["rowcast_held_up_total"]
            async with daemon.client(chat.bob) as newcomer:
                assert chat.bob == newcomer.welcome["user"]
            assert 200 == (await get(f"{daemon.http}/healthz"))[0]
        after = await counters(daemon)
    for counter in ('rowcast_errors_total{code="token"}', 'rowcast_closed_total{code="4401"}'):
        assert after[counter] > before.get(counter, 0), counter


async def test_a_client_that_asks_ahead_without_end_is_closed_and_others_are_not(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client, daemon.client(chat.bob) as hasty:
        await client.subscribe(chat.topic)
        with suppress(ConnectionClosed):  # on a busy machine before the last of them is sent
            for number in range(400):
                await hasty.say(op="subscribe", topic=f"channel:{number:026}")
        last = await hasty.next()
        while last.get("code") != "too_many_frames":
            last = await hasty.next()
        assert last["retry"] is True
        assert 4429 == (await hasty.closed())[0]
        await chat.say("undisturbed")
        assert "undisturbed" == (await client.changes())[0]["record"]["content"]
