"""Server-sent events: the same changes as over a websocket, from a real daemon, for clients that only read."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, daemon_process, get, token
from tests.support.event_stream import Stream, event_stream
from tests.support.gateways import PLACES, node
from tests.support.postgres import Server

LIMIT = 100_000  # bytes that may be queued for a client
LONG = 60_000  # characters of a message: kernels buffer megabytes for a client that does not read


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module", params=PLACES)
async def daemon(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Daemon]:
    settings = {"ROWCAST_QUEUE_BYTES": str(LIMIT), "ROWCAST_HEARTBEAT": "0.2", "ROWCAST_SNAPSHOT_ROWS": "100"}
    async with node(request.param, database, environment=settings) as process:
        yield process


@pytest.fixture
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin_again(sql, daemon)


async def contents(stream: Stream, count: int) -> list[str]:
    """The contents of the next `count` messages."""
    found: list[str] = []
    while len(found) < count:
        for event in await stream.until("changes"):
            found += [change["record"]["content"].partition(" ")[0] for change in event.frame.get("changes", ())]
    return found


async def test_a_stream_shows_each_change_with_the_position_as_its_id(daemon: Daemon, chat: Chat) -> None:
    async with event_stream(daemon.address, token(chat.ada), chat.topic) as stream:
        assert (200, "text/event-stream") == (stream.status, stream.headers["content-type"])
        [welcome, subscribed] = await stream.until("subscribed")
        assert ("welcome", welcome.frame["pos"]) == (welcome.op, welcome.id)
        assert chat.topic == subscribed.frame["topic"]
        message = await chat.say("hello")
        [changes] = await stream.until("changes")
    assert changes.frame["pos"] == changes.id
    [change] = changes.frame["changes"]
    assert ("messages", "insert", {"id": message}) == (change["table"], change["kind"], change["key"])


async def test_an_event_is_the_frame_that_a_websocket_gets(daemon: Daemon, chat: Chat) -> None:
    async with (
        daemon.client(chat.ada, numbers="string") as client,
        event_stream(daemon.address, token(chat.ada), chat.topic, "users", numbers="string") as stream,
    ):
        await stream.until("subscribed")
        await stream.until("subscribed")
        await client.subscribe(chat.topic)
        await chat.say("hello\n\nworld")
        assert await client.next() == (await stream.until("changes"))[-1].frame


async def test_a_client_that_resumes_from_its_last_id_misses_nothing(daemon: Daemon, chat: Chat) -> None:
    topics = (chat.topic, f"channel:{chat.other}")
    written: set[str] = set()
    received: set[str] = set()
    last_id: str | None = None

    async def say(content: str, channel: str) -> None:
        written.add(content)
        await chat.say(content, channel)

    for number in range(4):
        async with event_stream(daemon.address, token(chat.ada), *topics, last_id=last_id) as stream:
            if number == 0:
                await stream.until("subscribed")
                await stream.until("subscribed")
            await say(f"{number}a", chat.channel)
            await say(f"{number}b", chat.other)
            while written - received:
                received |= set(await contents(stream, 1))
            last_id = stream.last_id
        await say(f"{number}c", chat.channel)
        await say(f"{number}d", chat.other)


async def test_a_stream_begins_with_the_rows_if_it_is_asked_to(daemon: Daemon, chat: Chat) -> None:
    await chat.say("first")
    await chat.say("second")
    await chat.settled(daemon)
    async with event_stream(daemon.address, token(chat.ada), chat.topic, snapshot="1") as stream:
        events = await stream.until("resumed")
        assert [None] * (len(events) - 1) == [event.id for event in events[:-1]]
        assert events[-1].frame["pos"] == events[-1].id
        rows = [row for event in events for row in event.frame.get("rows", ()) if event.frame["table"] == "messages"]
        assert ["second"] == [row["record"]["content"] for row in rows]
        last_id = stream.last_id
    await chat.say("third")
    async with event_stream(daemon.address, token(chat.ada), chat.topic, snapshot="1", last_id=last_id) as stream:
        assert ["third"] == await contents(stream, 1)


async def test_a_client_that_reads_slowly_is_served_from_the_log(daemon: Daemon, chat: Chat) -> None:
    async with event_stream(daemon.address, token(chat.ada), chat.topic, receive_buffer=4096) as stream:
        await stream.until("subscribed")
        for number in range(150):
            await chat.say(f"{number} " + "x" * LONG)
            if number in {75, 149}:  # more than one batch, and all of them before the client reads
                await chat.settled(daemon)
        while "rowcast_clients_behind 1.0" not in (await get(f"{daemon.http}/metrics"))[1]:
            await asyncio.sleep(0.05)
        assert list(map(str, range(150))) == await contents(stream, 150)
        [resumed] = await stream.until("resumed")
        assert resumed.frame["pos"] == resumed.id
        await chat.say("live")
        assert ["live"] == await contents(stream, 1)


async def test_a_stream_ends_when_the_right_to_its_last_topic_does(daemon: Daemon, chat: Chat) -> None:
    other = f"channel:{chat.other}"
    async with event_stream(daemon.address, token(chat.ada), chat.topic, other) as stream:
        await stream.until("subscribed")
        await stream.until("subscribed")
        for topic in (chat.topic, other):
            await chat.sql.execute(
                "delete from chatgenius.channel_members where user_id = $1 and channel_id = $2",
                chat.ada,
                topic.removeprefix("channel:"),
            )
            assert topic == (await stream.until("revoked"))[-1].frame["topic"]
        assert await stream.next() is None
    async with event_stream(daemon.address, token(chat.ada), other, last_id=stream.last_id) as stream:
        assert 404 == stream.status


async def test_a_topic_that_cannot_be_read_is_an_event_if_another_can(daemon: Daemon, chat: Chat) -> None:
    async with event_stream(daemon.address, token(chat.ada), "channel:none", chat.topic) as stream:
        events = await stream.until("subscribed")
        assert ["welcome", "error", "subscribed"] == [event.op for event in events]
        assert (0, "no_such_topic") == (events[1].frame["id"], events[1].frame["code"])
        await chat.say("hello")
        assert ["hello"] == await contents(stream, 1)


async def test_a_stream_ends_with_its_token(daemon: Daemon, chat: Chat) -> None:
    async with event_stream(daemon.address, token(chat.ada, ttl=2), chat.topic) as stream:
        assert "token" == (await stream.until("error"))[-1].frame["code"]
        assert await stream.next() is None


async def test_a_daemon_that_stops_says_when_to_come_back(database: str, chat: Chat) -> None:
    async with (
        daemon_process(database) as daemon,
        event_stream(daemon.address, token(chat.ada), chat.topic) as stream,
    ):
        await stream.until("subscribed")
        assert "rowcast_event_streams 1.0" in (await get(f"{daemon.http}/metrics"))[1]
        stopped = asyncio.create_task(daemon.stop())
        bye = (await stream.until("bye"))[-1]
        assert str(bye.frame["retry_ms"]) == bye.retry
        assert await stream.next() is None
        stream.connection.close()
        assert 0 == await stopped


async def test_what_is_wrong_with_a_request_is_its_response(daemon: Daemon, chat: Chat) -> None:
    for name in range(101):
        await chat.say(str(name))
    await chat.settled(daemon)
    good = token(chat.ada)
    cases: list[tuple[str | None, tuple[str, ...], dict[str, Any], int, str]] = [
        (None, (chat.topic,), {}, 401, "token"),
        ("forged", (chat.topic,), {}, 401, "token"),
        (good, ("channel:none",), {}, 404, "no_such_topic"),
        (token(chat.bob), (chat.topic, "channel:none"), {}, 404, "no_such_topic"),
        (good, (), {}, 400, "bad_frame"),
        (good, ("*",), {}, 400, "bad_frame"),
        (good, (chat.topic,), {"snapshot": "yes"}, 400, "bad_frame"),
        (good, (chat.topic,), {"snapshot": "0"}, 400, "bad_frame"),
        (good, (chat.topic,), {"snapshot": "true"}, 413, "too_large"),
        (good, (chat.topic,), {"last_id": "yesterday"}, 400, "bad_frame"),
    ]
    for given, topics, more, status, code in cases:
        async with event_stream(daemon.address, given, *topics, **more) as stream:
            body = await stream.body()
            assert (status, 1) == (stream.status, body.count(b"\n")), (topics, more, body)
            assert f'"code":"{code}"'.encode() in body, (topics, more, body)
    assert [] == daemon.warnings()
