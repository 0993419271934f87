"""Filters and columns with a real daemon: live, in a snapshot, when a client resumes, and when they are wrong."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from daemon.postgres.connect import Connection
from tests.acceptance.chat import Chat
from tests.support.daemon import Client, Daemon, token
from tests.support.event_stream import event_stream
from tests.support.gateways import PLACES, node
from tests.support.postgres import Server

SEED = 7
WORDS = ("red", "green", "blue", "Red", "")
FILTERS: list[dict[str, Any]] = [
    {"content": {"eq": "red"}},
    {"content": {"ilike": "%r%"}, "metadata": {"is_null": True}},
    {"or": [{"content": {"in": ["green", ""]}}, {"not": {"metadata": {"is_null": True}}}]},
    {"not": {"content": {"gte": "g"}}},
]


@pytest.fixture(scope="module")
async def database(postgres: Server) -> AsyncIterator[str]:
    async with postgres.chatgenius() as dsn:
        yield dsn


@pytest.fixture(scope="module", params=PLACES)
async def daemon(request: pytest.FixtureRequest, database: str) -> AsyncIterator[Daemon]:
    async with node(request.param, database) as process:
        yield process


@pytest.fixture
async def chat(daemon: Daemon, sql: Connection) -> Chat:
    return await Chat.begin_again(sql, daemon)


async def edit(chat: Chat, message: str, content: str) -> None:
    await chat.sql.execute("update chatgenius.messages set content = $2 where id = $1", message, content)


def sent_changes(changes: list[Any]) -> list[tuple[str, str | None, bool]]:
    """What was sent: the kind, the content, and whether the row left."""
    return [(each["kind"], each.get("record", {}).get("content"), each.get("left", False)) for each in changes]


async def snapshot(client: Client, topic: str, **members: object) -> dict[str, list[Any]]:
    await client.subscribe(topic, **members)
    rows: dict[str, list[Any]] = {}
    for frame in (await client.until("resumed"))[:-1]:
        rows.setdefault(frame["table"], []).extend(frame["rows"])
    return rows


async def test_rows_enter_and_leave_a_filter_and_only_they_are_sent(daemon: Daemon, chat: Chat) -> None:
    where = {"messages": {"content": {"starts_with": "todo"}}}
    async with daemon.client(chat.ada) as filtered, daemon.client(chat.ada) as plain:
        await filtered.subscribe(chat.topic, where=where)
        await plain.subscribe(chat.topic)
        await chat.say("hello")
        message = await chat.say("todo: write")
        for content in ("todo: read", "done", "done and dusted", "todo: again"):
            await edit(chat, message, content)
        # No replay shows the content of a deleted row, and the clients may still be in theirs.
        shown, others = await filtered.changes(5), await plain.changes(6)
        await chat.sql.execute("delete from chatgenius.messages where id = $1", message)
        assert [
            ("insert", "todo: write", False),
            ("update", "todo: read", False),
            ("delete", None, True),
            ("delete", None, True),  # nobody knows whether the row was seen before
            ("update", "todo: again", False),
            ("delete", None, False),
        ] == sent_changes(shown + await filtered.changes(1))
        assert 7 == len(others + await plain.changes(1))


async def test_an_update_of_columns_that_are_not_asked_for_is_not_sent(daemon: Daemon, chat: Chat) -> None:
    async with daemon.client(chat.ada) as client:
        await client.subscribe(chat.topic, columns={"messages": ["content"]})
        message = await chat.say("a")
        await chat.sql.execute("update chatgenius.messages set metadata = '{}' where id = $1", message)
        await edit(chat, message, "b")
        inserted, updated = await client.changes(2)
    assert ({"id": message}, {"content": "a"}) == (inserted["key"], inserted["record"])
    assert ({"content": "b"}, ["content"]) == (updated["record"], updated["changed"])


async def test_a_filter_holds_in_a_snapshot_and_its_limit_counts_what_matches(daemon: Daemon, chat: Chat) -> None:
    where = {"messages": {"content": {"like": "keep %"}}}
    for number in range(5):
        await chat.say(f"keep {number}")
        await chat.say(f"other {number}")
    async with daemon.client(chat.ada) as client:
        rows = await snapshot(
            client, chat.topic, where=where, columns={"messages": ["content"]}, snapshot={"limit": 3}
        )
        assert [{"content": f"keep {number}"} for number in (2, 3, 4)] == [
            each["record"] for each in rows["messages"]
        ]
        assert 1 == len(rows["channels"])
        await chat.say("other 5")
        await chat.say("keep 5")
        assert [("insert", "keep 5", False)] == sent_changes(await client.changes(1))


async def test_a_client_that_resumes_with_its_filter_gets_what_it_missed_of_it(daemon: Daemon, chat: Chat) -> None:
    where = {"messages": {"user_id": {"eq": chat.ada}, "content": {"ne": "other"}}}
    message = await chat.say("first")
    await chat.settled(daemon)
    async with daemon.client(chat.ada) as client:
        since = (await client.subscribe(chat.topic, where=where))["pos"]
    await chat.say("other")
    await edit(chat, message, "other")
    await chat.say("last")
    await chat.settled(daemon)
    async with daemon.client(chat.ada, since=since) as client:
        await client.subscribe(chat.topic, where=where)
        assert [("delete", None, True), ("insert", "last", False)] == sent_changes(await client.changes(2))
        assert 2 == (await client.until("resumed"))[-1]["replayed"]


async def test_a_stream_of_events_takes_a_filter_and_columns_as_json(daemon: Daemon, chat: Chat) -> None:
    where, columns = '{"messages": {"content": {"ne": "a"}}}', '{"messages": ["content"]}'
    user = token(chat.ada)
    async with event_stream(daemon.address, user, chat.topic, where=where, columns=columns) as stream:
        await stream.until("subscribed")
        await chat.say("a")
        await chat.say("b")
        [event] = await stream.until("changes")
        assert [{"content": "b"}] == [change["record"] for change in event.frame["changes"]]
    wrong = '{"messages": {"size": {"eq": 1}}}'
    async with event_stream(daemon.address, user, chat.topic, where=wrong) as stream:
        assert 400 == stream.status
        assert b"bad_filter" in await stream.body()


async def test_each_mistake_in_a_filter_has_a_code_and_names_the_member(daemon: Daemon, chat: Chat) -> None:
    deep: dict[str, Any] = {"id": {"eq": "x"}}
    for _ in range(9):
        deep = {"not": deep}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"where": {"orders": {"id": {"eq": 1}}}}, "bad_filter", "where.orders: the topic has no such table"),
        (
            {"where": {"users": {"email": {"eq": "x"}}}},
            "bad_filter",
            "where.users.email: the table publishes no such",
        ),
        ({"where": {"messages": {"id": {"regex": "x"}}}}, "bad_filter", "where.messages.id.regex: there is no such"),
        ({"where": {"messages": {"id": {"eq": 1}}}}, "bad_filter", "where.messages.id.eq: must be a string"),
        ({"where": {"messages": {"id": {"eq": None}}}}, "bad_filter", "where.messages.id.eq: must be a string"),
        ({"where": {"messages": {"metadata": {"eq": {}}}}}, "bad_filter", "where.messages.metadata.eq: the column's"),
        ({"where": {"messages": {"created_at": {"gt": "2026"}}}}, "bad_filter", "where.messages.created_at.gt: must"),
        ({"where": {"messages": {}}}, "bad_filter", "where.messages: must be an object"),
        ({"where": [1]}, "bad_filter", "where: must be an object"),
        ({"where": {"messages": {"or": []}}}, "bad_filter", "where.messages.or: must be an array"),
        ({"where": {"messages": deep}}, "filter_too_large", "where.messages.not.not"),
        (
            {"where": {"messages": {"id": {"in": ["x"] * 101}}}},
            "filter_too_large",
            "where.messages.id.in: a filter has",
        ),
        ({"columns": {"messages": []}}, "bad_filter", "columns.messages: must be an array"),
        ({"columns": {"messages": ["deleted_at"]}}, "bad_filter", "columns.messages[0]: the table publishes no such"),
        ({"columns": {}}, "bad_filter", "columns: must be an object"),
    ]
    async with daemon.client(chat.ada) as client:
        for members, code, message in cases:
            answer = await client.subscribe(chat.topic, **members)
            assert ("error", code, False) == (answer["op"], answer["code"], answer["retry"]), answer
            assert answer["message"].startswith(message), answer
        assert "subscribed" == (await client.subscribe(chat.topic))["op"]
        again = await client.subscribe(chat.topic, where={"messages": {"content": {"eq": "x"}}})
        assert "already_subscribed" == again["code"]


async def write(chat: Chat, dice: random.Random, messages: list[str]) -> None:
    """Insert, edit, move, delete softly or restore a few messages in one transaction."""
    values: dict[str, Callable[[], object]] = {
        "content = $2": lambda: dice.choice(WORDS),
        "metadata = $2": lambda: dice.choice([None, "{}"]),
        "channel_id = $2": lambda: dice.choice([chat.channel, chat.other]),
        "deleted_at = case when $2 then now() end": lambda: dice.choice([True, False]),
    }
    async with chat.sql.transaction():
        for _ in range(dice.randint(1, 3)):
            change = dice.choice(["", *values])
            if not change or not messages:
                messages.append(await chat.say(dice.choice(WORDS)))
            else:
                statement = f"update chatgenius.messages set {change} where id = $1"
                await chat.sql.execute(statement, dice.choice(messages), values[change]())


class Watcher:
    """A client that follows the topic with a filter and some columns, and keeps the messages that it is sent."""

    def __init__(self, topic: str, where: dict[str, Any]) -> None:
        self.topic = topic
        self.where = where
        self.members = {"where": {"messages": where}, "columns": {"messages": ["content", "metadata"]}}
        self.rows: dict[str, Any] = {}
        self.position: str | None = None

    async def follow(self, client: Client, **members: object) -> None:
        await client.subscribe(self.topic, **self.members, **members)
        await self.receive(client, "resumed")

    async def receive(self, client: Client, last: str) -> None:
        """Apply all frames up to one of this kind."""
        for frame in await client.until(last):
            self.position = frame.get("pos", self.position)
            for row in frame.get("rows", ()):
                if frame["table"] == "messages":
                    self.rows[row["key"]["id"]] = row["record"]
            for change in frame.get("changes", ()):
                if change["table"] == "messages":
                    self.rows.pop(change["key"]["id"], None)
                    if change["kind"] != "delete":
                        self.rows[change["key"]["id"]] = change["record"]


async def test_what_clients_with_filters_have_is_always_what_a_new_snapshot_contains(
    daemon: Daemon, chat: Chat
) -> None:
    dice, messages = random.Random(SEED), list[str]()
    watchers = [Watcher(chat.topic, where) for where in FILTERS]
    sizes = set()
    for _ in range(6):
        async with AsyncExitStack() as stack:
            clients = []
            for watcher in watchers:
                client = await stack.enter_async_context(daemon.client(chat.ada, since=watcher.position))
                clients.append(client)
                await watcher.follow(client, **({} if watcher.position else {"snapshot": True}))
            for _ in range(15):
                await write(chat, dice, messages)
            await chat.settled(daemon)
            for watcher, client in zip(watchers, clients, strict=True):
                await client.say(op="ping")
                await watcher.receive(client, "pong")
                fresh = Watcher(chat.topic, watcher.where)
                async with daemon.client(chat.ada) as other:
                    await fresh.follow(other, snapshot=True)
                assert fresh.rows == watcher.rows
                sizes.add(len(fresh.rows))
        for _ in range(10):
            await write(chat, dice, messages)
    assert len(sizes) > 5  # else hardly anything has happened


async def test_a_client_begins_with_filtered_rows_and_is_present(daemon: Daemon, chat: Chat) -> None:
    for content in ("red", "blue"):
        await chat.say(content)
    async with daemon.client(chat.ada) as client:
        members = {
            "where": {"messages": {"content": {"eq": "red"}}},
            "snapshot": True,
            "presence": {"data": {"n": 1}},
        }
        await client.subscribe(chat.topic, **members)
        frames = await client.until("presence")
        rows = [row["record"] for frame in frames if frame["op"] == "snapshot" for row in frame["rows"]]
        assert ["red"] == [row["content"] for row in rows if "content" in row]
        assert [{"n": 1}] == [one["data"] for one in frames[-1]["state"][chat.ada]]
        wrong = {"where": {"messages": {"color": {"eq": 1}}}, "presence": {}}
        await client.say(op="unsubscribe", topic=chat.topic)
        await client.say(op="subscribe", topic=chat.topic, **wrong)
        assert "bad_filter" == (await client.until("error"))[-1]["code"]
        await client.say(op="presence", topic=chat.topic, data={})
        assert "not_subscribed" == (await client.until("error"))[-1]["code"]
