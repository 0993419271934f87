"""With ROWCAST_TRANSACTION_IDS=false, nothing that a client gets tells which transaction made a change."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.acceptance.chat import Chat
from tests.support.daemon import Daemon, Frame, daemon_process, token
from tests.support.event_stream import event_stream

HIDDEN = {"ROWCAST_TRANSACTION_IDS": "false"}


@pytest.fixture
async def daemon(database: str, chat: Chat) -> AsyncIterator[Daemon]:
    async with daemon_process(database, environment=HIDDEN) as process:
        yield process


def shown(changes: list[Frame]) -> list[tuple[str, bool]]:
    """Of each change the content, and whether its transaction is named."""
    return [(change["record"]["content"], "tx" in change) for change in changes]


async def say_two(chat: Chat) -> None:
    async with chat.sql.transaction():
        await chat.say("a")
        await chat.say("b")


@pytest.mark.parametrize(
    ("hello", "subscribe"),
    [
        ({}, {}),
        ({"numbers": "string"}, {}),
        ({}, {"where": {"messages": {"content": {"ne": "c"}}}, "columns": {"messages": ["content"]}}),
    ],
    ids=["plain", "exact numbers", "filter and columns"],
)
async def test_changes_do_not_name_their_transaction_live_and_in_replays(
    daemon: Daemon, chat: Chat, database: str, hello: dict[str, Any], subscribe: dict[str, Any]
) -> None:
    async with daemon.client(chat.ada, **hello) as client:
        since = client.welcome["pos"]
        await client.subscribe(chat.topic, **subscribe)
        await say_two(chat)
        live = await client.changes(2)
    assert [("a", False), ("b", False)] == shown(live)
    async with daemon_process(database, environment=HIDDEN) as another:
        for source in (daemon, another):  # from memory, and from the log
            async with source.client(chat.ada, since=since, **hello) as client:
                await client.subscribe(chat.topic, **subscribe)
                assert live == await client.changes(2)


async def test_after_a_snapshot_and_in_a_stream_of_events_changes_do_not_name_it_either(
    daemon: Daemon, chat: Chat
) -> None:
    await chat.say("before")
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic, snapshot=True)
        since = (await client.until("resumed"))[-1]["pos"]
        await say_two(chat)
        live = await client.changes(2)
    assert [("a", False), ("b", False)] == shown(live)
    async with event_stream(daemon.address, token(chat.ada), chat.topic, last_id=since) as stream:
        events = await stream.until("resumed")
    assert live == [change for event in events for change in event.frame.get("changes", ())]
